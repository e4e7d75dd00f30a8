// Caching allocator: asks the device for large segments and serves blocks from them, so that a training step makes no
// device allocation after the first. Size classes, best fit, split and merge, per-pool statistics, limits.
// Every block carries its category and layer, so a peak can be explained. The device is behind DeviceMemory: the tests use a fake one.
// One compute stream: freed memory is safe to reuse at once, because work is ordered.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/device.h"

namespace weft {

enum class Category : uint8_t { parameter, gradient, optimizer, activation, workspace, data };
inline constexpr int kCategories = 6;
constexpr const char* name_of(Category c) {
  constexpr const char* kNames[] = {"parameter", "gradient", "optimizer", "activation", "workspace", "data"};
  return kNames[static_cast<int>(c)];
}

// Sets the category (and the layer's name) of what this thread allocates while it lives; scopes nest.
// `layer` must live as long as the process, for statistics name it after its blocks are gone: pass a literal or an
// interned name.
class MemoryScope {
 public:
  explicit MemoryScope(Category category);
  MemoryScope(Category category, const char* layer);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;
  static const char* layer();  // this thread's now

 private:
  Category old_category_;
  const char* old_layer_;
};

using ByCategory = std::array<int64_t, kCategories>;

// One of the two pools of segments: blocks up to 1 MiB come from the small one. Bytes, but for free_blocks.
struct PoolStats {
  int64_t allocated = 0, reserved = 0, held = 0, free_blocks = 0, largest_free = 0;
};

// Bytes. requested: what callers asked for; allocated: after rounding; reserved: taken from the device, of which `held`
// is free but set aside for memory pools (below). free_blocks and largest_free leave those out.
struct MemoryStats {
  int64_t requested = 0, allocated = 0, reserved = 0, held = 0;
  int64_t peak_requested = 0, peak_allocated = 0, peak_reserved = 0;
  ByCategory current{}, peak{};    // allocated per category now, and each category's own peak
  ByCategory at_peak{};            // the breakdown at the moment of peak_allocated
  int64_t largest_free = 0;        // largest free block
  PoolStats small, large;
  int64_t device_allocations = 0;  // segments ever taken from the device
  int64_t allocations = 0;         // blocks ever handed out
};

// Bytes that one layer held in one category at the moment of peak_allocated.
struct LayerUse {
  std::string layer;  // "" outside every named scope
  Category category;
  int64_t bytes;
};

// One block handed out (bytes > 0) or taken back (bytes < 0).
struct MemoryEvent {
  int64_t sequence;  // counts from 0 where recording began
  int64_t bytes;
  Category category;
  const char* layer;
  int64_t allocated;  // after it
};

// What the allocator needs of a device. allocate returns nullptr when the device has no more.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* p) noexcept = 0;
  virtual size_t total() const = 0;   // bytes of the whole device
  virtual std::string name() const = 0;
};

class MemoryPool;

class CachingAllocator {
 public:
  explicit CachingAllocator(std::unique_ptr<DeviceMemory> device);
  ~CachingAllocator();
  // Memory of at least `bytes` (>= 0), aligned to 512 bytes; nullptr for 0 bytes. Throws Fault::device with what was
  // asked, what is held and by which category when the device or the limit has no more.
  void* allocate(int64_t bytes);
  // nullptr is passed over. A pointer that no block starts at (freed twice, or foreign) is a bug that memory would not
  // survive: the process says so and aborts.
  void free(void* p) noexcept;
  // The block that starts at p counts as this from now on; false where none starts there.
  bool relabel(void* p, Category category, const char* layer);

  MemoryStats stats() const;
  std::vector<LayerUse> layers_at_peak() const;  // largest first; they add up to peak_allocated
  void reset_peaks();
  // Records every block handed out or taken back from now on, forgetting what was recorded; keeps the newest
  // `capacity` events.
  void start_timeline(int64_t capacity);
  void stop_timeline();                       // what was recorded stays
  std::vector<MemoryEvent> timeline() const;  // oldest first
  // At most this many bytes reserved; 0 means no limit but the device's.
  void set_limit(int64_t bytes);
  // Gives every segment that no block uses and no pool holds back to the device.
  void release_cached();

 private:
  friend class MemoryPool;
  struct Core;
  std::unique_ptr<Core> core_;
};

// Memory set aside for work that is recorded once and runs again later, at the same addresses (a CUDA graph): what is
// allocated within a Use of the pool returns to the pool when freed, and serves nothing outside such uses until the
// pool is gone. A pool takes what it lacks from the allocator's idle memory first, so after a step that ran before, it
// needs nothing new from the device.
class MemoryPool {
 public:
  explicit MemoryPool(CachingAllocator& allocator);
  ~MemoryPool();  // gives back what is free; what is in use goes back to the allocator when it is freed
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;
  int64_t live_blocks() const;  // handed out and not yet freed

  // While one lives, this thread's allocations come from the pool. Work that runs between two runs of the recorded one
  // may use its pool too, as long as nothing of it stays: the recorded work writes there again.
  class Use {
   public:
    explicit Use(MemoryPool& pool);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    MemoryPool* before_;
  };

 private:
  friend class CachingAllocator;
  struct Blocks;
  CachingAllocator& allocator_;
  std::unique_ptr<Blocks> blocks_;
};

// The process's allocator of a device.
CachingAllocator& allocator(Device d);

}  // namespace weft
