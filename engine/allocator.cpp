#include "engine/allocator.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <unordered_map>

#include "engine/check.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

constexpr int64_t kUnit = 512;                   // every block is a multiple of it, and aligned to it
constexpr int64_t kSmall = 1 << 20;              // blocks up to this come from small segments
constexpr int64_t kSmallSegment = 2 << 20;
constexpr int64_t kMedium = 10 << 20;            // larger ones up to this from medium segments,
constexpr int64_t kMediumSegment = 20 << 20;
constexpr int64_t kLargeUnit = 2 << 20;          // and the rest get segments of their own, rounded to this
constexpr int64_t kLargest = int64_t{1} << 46;   // no device has this much

thread_local Category scope_category = Category::activation;
thread_local const char* scope_layer = "";

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

std::string human(int64_t bytes) {
  const double b = static_cast<double>(bytes);
  if (bytes < 1 << 10) return fmt::format("{} B", bytes);
  if (bytes < 1 << 20) return fmt::format("{:.2f} KiB", b / (1 << 10));
  return bytes < 1 << 30 ? fmt::format("{:.2f} MiB", b / (1 << 20)) : fmt::format("{:.2f} GiB", b / (1 << 30));
}

struct Block {
  char* address;
  int64_t size, requested = 0;
  bool small, free = true;
  Block *before = nullptr, *after = nullptr;  // neighbours in the segment
  Category category = Category::activation;
  const char* layer = "";
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return a->size != b->size ? a->size < b->size : a->address < b->address;
  }
};

using Use = std::map<std::pair<Category, const char*>, int64_t>;

}  // namespace

MemoryScope::MemoryScope(Category category) : MemoryScope(category, scope_layer) {}
MemoryScope::MemoryScope(Category category, const char* layer)
    : old_category_(scope_category), old_layer_(scope_layer) {
  scope_category = category;
  scope_layer = layer;
}
MemoryScope::~MemoryScope() {
  scope_category = old_category_;
  scope_layer = old_layer_;
}

struct CachingAllocator::Core {
  mutable std::mutex mutex;
  std::unique_ptr<DeviceMemory> device;
  std::unordered_map<void*, Block*> live;
  std::set<Block*, BySize> free_small, free_large;
  MemoryStats stats;
  Use use;
  // The breakdown at the peak is taken when memory first falls after it: until then use only grew.
  mutable Use peak_use;
  mutable ByCategory at_peak{};
  mutable bool peak_is_now = true;
  int64_t limit = 0;
  std::vector<MemoryEvent> ring;  // event n is at n % capacity
  int64_t ring_capacity = 0, events = 0;
  bool recording = false;

  std::set<Block*, BySize>& pool(bool small) { return small ? free_small : free_large; }

  PoolStats& pool_stats(bool small) { return small ? stats.small : stats.large; }

  // Counts a block in (sign 1) or out (sign -1), in everything that is summed.
  void account(const Block& b, int64_t sign) {
    const int64_t bytes = sign * b.size;
    stats.requested += sign * b.requested;
    stats.allocated += bytes;
    stats.current[static_cast<int>(b.category)] += bytes;
    pool_stats(b.small).allocated += bytes;
    use[{b.category, b.layer}] += bytes;
    if (!recording) return;
    const MemoryEvent event{events, bytes, b.category, b.layer, stats.allocated};
    if (events < ring_capacity)
      ring.push_back(event);
    else
      ring[static_cast<size_t>(events % ring_capacity)] = event;
    ++events;
  }

  void keep_peak() const {
    if (!peak_is_now) return;
    peak_use = use;
    at_peak = stats.current;
    peak_is_now = false;
  }

  Block* find_free(int64_t size, bool small) {
    Block wanted{nullptr, size, 0, small};
    const auto it = pool(small).lower_bound(&wanted);
    return it == pool(small).end() ? nullptr : *it;
  }

  // A new segment as one free block; nullptr when neither limit nor device has room, also after emptying the cache.
  Block* take_segment(int64_t size, bool small) {
    const int64_t least = small ? kSmallSegment : round_up(size, kLargeUnit);
    int64_t bytes = !small && size <= kMedium ? kMediumSegment : least;
    const auto attempt = [&]() -> void* {
      if (limit > 0 && stats.reserved + bytes > limit) return nullptr;
      return device->allocate(static_cast<size_t>(bytes));
    };
    void* memory = attempt();
    if (!memory && release_cached() > 0) memory = attempt();
    if (!memory && bytes > least) {
      bytes = least;
      memory = attempt();
    }
    if (!memory) return nullptr;
    auto block = std::make_unique<Block>(Block{static_cast<char*>(memory), bytes, 0, small});
    pool_stats(small).reserved += bytes;
    stats.reserved += bytes;
    stats.peak_reserved = std::max(stats.peak_reserved, stats.reserved);
    ++stats.device_allocations;
    pool(small).insert(block.get());
    return block.release();
  }

  int64_t release_cached() {
    int64_t released = 0;
    for (auto* blocks : {&free_small, &free_large})
      for (auto it = blocks->begin(); it != blocks->end();) {
        Block* b = *it;
        if (b->before || b->after) {
          ++it;
          continue;
        }
        it = blocks->erase(it);
        released += b->size;
        pool_stats(b->small).reserved -= b->size;
        device->release(b->address);
        delete b;
      }
    stats.reserved -= released;
    return released;
  }

  // Cuts what `block` has beyond `size` off as a free block, where the rest is worth keeping.
  void split(Block* block, int64_t size) {
    const int64_t rest = block->size - size;
    if (rest < kUnit || (!block->small && rest <= kSmall)) return;
    auto* tail = new Block{block->address + size, rest, 0, block->small};
    tail->before = block;
    tail->after = block->after;
    if (tail->after) tail->after->before = tail;
    block->after = tail;
    block->size = size;
    pool(block->small).insert(tail);
  }

  // Joins `b` with the free block after it.
  void absorb_next(Block* b) {
    Block* next = b->after;
    pool(b->small).erase(next);
    b->size += next->size;
    b->after = next->after;
    if (b->after) b->after->before = b;
    delete next;
  }

  static int64_t largest(const std::set<Block*, BySize>& blocks) {
    return blocks.empty() ? 0 : (*blocks.rbegin())->size;
  }
  int64_t largest_free() const { return std::max(largest(free_small), largest(free_large)); }

  // What would help, judged by what is held.
  std::string advice(int64_t bytes) const {
    const int64_t total = static_cast<int64_t>(device->total()), idle = stats.reserved - stats.allocated;
    const auto of = [&](Category c) { return stats.current[static_cast<int>(c)]; };
    std::string smaller = "make the batch, the sequence or the model smaller";
    if (of(Category::activation) > stats.allocated / 2) smaller = "make the batch or the sequence smaller";
    if (of(Category::parameter) + of(Category::gradient) + of(Category::optimizer) > stats.allocated / 2)
      smaller = "make the model smaller";
    if (bytes > total) return "that is more than the whole device: " + smaller;
    if (limit > 0 && limit < total && stats.reserved + round_up(bytes, kLargeUnit) > limit)
      return smaller + ", or raise the memory limit";
    std::string text;
    if (bytes <= total - stats.reserved)
      text = fmt::format("{} of the device is held by the driver, libraries or other programs: ",
                         human(total - stats.reserved));
    else if (bytes <= idle)
      text = "what is idle would do, but it is in pieces between blocks in use: ";
    return text + smaller;
  }

  [[noreturn]] void out_of_memory(int64_t bytes) const {
    std::string held;
    for (int c = 0; c < kCategories; ++c)
      if (stats.current[c] > 0)
        held += fmt::format("{}{} {}", held.empty() ? "" : ", ", name_of(static_cast<Category>(c)),
                            human(stats.current[c]));
    const int64_t idle = stats.reserved - stats.allocated;
    fail(Fault::device,
         "out of memory on {}: {} asked for {}{}{}; {} is held ({}), {} reserved of {}{}, {} of it idle with {} in one "
         "piece; {}",
         device->name(), human(bytes), name_of(scope_category), *scope_layer ? " of " : "", scope_layer,
         human(stats.allocated), held.empty() ? "nothing" : held, human(stats.reserved), human(device->total()),
         limit > 0 ? fmt::format(" with a limit of {}", human(limit)) : "", human(idle), human(largest_free()),
         advice(bytes));
  }
};

CachingAllocator::CachingAllocator(std::unique_ptr<DeviceMemory> device) : core_(std::make_unique<Core>()) {
  core_->device = std::move(device);
}

// Memory still in use stays with the device: whoever holds it may yet read it. Only what was known of it goes.
CachingAllocator::~CachingAllocator() {
  core_->release_cached();
  for (const auto& [address, block] : core_->live) delete block;
  for (const auto* blocks : {&core_->free_small, &core_->free_large})
    for (const Block* block : *blocks) delete block;
}

void* CachingAllocator::allocate(int64_t bytes) {
  check(bytes >= 0, "an allocation has at least 0 bytes, found {}", bytes);
  if (bytes == 0) return nullptr;
  Core& c = *core_;
  const std::lock_guard lock(c.mutex);
  if (bytes > kLargest) c.out_of_memory(bytes);
  const int64_t size = round_up(bytes, kUnit);
  const bool small = size <= kSmall;
  Block* block = c.find_free(size, small);
  if (!block) block = c.take_segment(size, small);
  if (!block) c.out_of_memory(bytes);
  c.pool(small).erase(block);
  c.split(block, size);
  block->free = false;
  block->requested = bytes;
  block->category = scope_category;
  block->layer = scope_layer;
  c.live.emplace(block->address, block);

  c.account(*block, 1);
  MemoryStats& s = c.stats;
  const int category = static_cast<int>(block->category);
  ++s.allocations;
  s.peak_requested = std::max(s.peak_requested, s.requested);
  s.peak[category] = std::max(s.peak[category], s.current[category]);
  if (s.allocated > s.peak_allocated) {
    s.peak_allocated = s.allocated;
    c.peak_is_now = true;
  }
  return block->address;
}

void CachingAllocator::free(void* p) noexcept {
  if (!p) return;
  Core& c = *core_;
  const std::lock_guard lock(c.mutex);
  const auto it = c.live.find(p);
  if (it == c.live.end()) {
    std::fprintf(stderr, "weft: bug: %p was freed, but no block starts there\n", p);
    std::abort();
  }
  Block* b = it->second;
  c.keep_peak();
  c.live.erase(it);
  c.account(*b, -1);
  b->free = true;
  if (b->after && b->after->free) c.absorb_next(b);
  if (b->before && b->before->free) {
    b = b->before;
    c.pool(b->small).erase(b);  // its size is about to change, and with it its place
    Block* merged = b->after;
    b->size += merged->size;
    b->after = merged->after;
    if (b->after) b->after->before = b;
    delete merged;
  }
  c.pool(b->small).insert(b);
}

MemoryStats CachingAllocator::stats() const {
  const std::lock_guard lock(core_->mutex);
  core_->keep_peak();
  MemoryStats s = core_->stats;
  s.at_peak = core_->at_peak;
  s.largest_free = core_->largest_free();
  s.small.free_blocks = static_cast<int64_t>(core_->free_small.size());
  s.small.largest_free = Core::largest(core_->free_small);
  s.large.free_blocks = static_cast<int64_t>(core_->free_large.size());
  s.large.largest_free = Core::largest(core_->free_large);
  return s;
}

std::vector<LayerUse> CachingAllocator::layers_at_peak() const {
  const std::lock_guard lock(core_->mutex);
  core_->keep_peak();
  // By text: the same literal may have one address in each file.
  std::map<std::pair<std::string, Category>, int64_t> sums;
  for (const auto& [key, bytes] : core_->peak_use)
    if (bytes > 0) sums[{key.second, key.first}] += bytes;
  std::vector<LayerUse> layers;
  for (const auto& [key, bytes] : sums) layers.push_back({key.first, key.second, bytes});
  std::stable_sort(layers.begin(), layers.end(), [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  return layers;
}

void CachingAllocator::reset_peaks() {
  const std::lock_guard lock(core_->mutex);
  MemoryStats& s = core_->stats;
  s.peak_requested = s.requested;
  s.peak_allocated = s.allocated;
  s.peak_reserved = s.reserved;
  s.peak = s.current;
  core_->peak_is_now = true;
}

void CachingAllocator::start_timeline(int64_t capacity) {
  check(capacity > 0, "a timeline keeps at least 1 event, found {}", capacity);
  const std::lock_guard lock(core_->mutex);
  core_->ring.clear();
  core_->ring_capacity = capacity;
  core_->events = 0;
  core_->recording = true;
}

void CachingAllocator::stop_timeline() {
  const std::lock_guard lock(core_->mutex);
  core_->recording = false;
}

std::vector<MemoryEvent> CachingAllocator::timeline() const {
  const std::lock_guard lock(core_->mutex);
  std::vector<MemoryEvent> events = core_->ring;
  if (core_->events > core_->ring_capacity)
    std::rotate(events.begin(), events.begin() + core_->events % core_->ring_capacity, events.end());
  return events;
}

void CachingAllocator::set_limit(int64_t bytes) {
  check(bytes >= 0, "a memory limit has at least 0 bytes, found {}", bytes);
  const std::lock_guard lock(core_->mutex);
  core_->limit = bytes;
}

void CachingAllocator::release_cached() {
  const std::lock_guard lock(core_->mutex);
  core_->release_cached();
}

namespace {

class HostMemory : public DeviceMemory {
 public:
  void* allocate(size_t bytes) override { return std::aligned_alloc(kUnit, bytes); }
  void release(void* p) noexcept override { std::free(p); }
  size_t total() const override { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE); }
  std::string name() const override { return "the CPU"; }
};

#if WEFT_CUDA
class GpuMemory : public DeviceMemory {
 public:
  void* allocate(size_t bytes) override {
    void* p = nullptr;
    if (cudaMalloc(&p, bytes) == cudaSuccess) return p;
    cudaGetLastError();
    return nullptr;
  }
  void release(void* p) noexcept override { cudaFree(p); }
  size_t total() const override {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? total : 0;
  }
  std::string name() const override { return "the GPU"; }
};
#endif

}  // namespace

// Never destroyed: tensors with static lifetime may outlive any order of destruction.
CachingAllocator& allocator(Device d) {
#if WEFT_CUDA
  static auto* gpu = new CachingAllocator(std::make_unique<GpuMemory>());
  if (d == Device::cuda) return *gpu;
#endif
  check(d == Device::cpu, "this build has no CUDA side");
  static auto* cpu = new CachingAllocator(std::make_unique<HostMemory>());
  return *cpu;
}

}  // namespace weft
