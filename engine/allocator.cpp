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
thread_local MemoryPool* pool_in_use = nullptr;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

std::string human(int64_t bytes) {
  const double b = static_cast<double>(bytes);
  if (bytes < 1 << 10) return fmt::format("{} B", bytes);
  if (bytes < 1 << 20) return fmt::format("{:.2f} KiB", b / (1 << 10));
  return bytes < 1 << 30 ? fmt::format("{:.2f} MiB", b / (1 << 20)) : fmt::format("{:.2f} GiB", b / (1 << 30));
}

struct Block;
struct BySize {
  bool operator()(const Block* a, const Block* b) const;
};
// The free blocks of one owner: the allocator itself, or a pool.
struct FreeBlocks {
  std::set<Block*, BySize> small, large;
  std::set<Block*, BySize>& of(bool is_small) { return is_small ? small : large; }
};

struct Block {
  char* address;
  int64_t size, requested = 0;
  bool small, free = true;
  FreeBlocks* owner;  // to whom it returns
  Block *before = nullptr, *after = nullptr;  // neighbours in the segment
  Category category = Category::activation;
  const char* layer = "";
};

bool BySize::operator()(const Block* a, const Block* b) const {
  return a->size != b->size ? a->size < b->size : a->address < b->address;
}

using UseByLayer = std::map<std::pair<Category, const char*>, int64_t>;

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
const char* MemoryScope::layer() { return scope_layer; }

struct MemoryPool::Blocks : FreeBlocks {
  int64_t live = 0;
};

struct CachingAllocator::Core {
  mutable std::mutex mutex;
  std::unique_ptr<DeviceMemory> device;
  std::unordered_map<void*, Block*> live;
  FreeBlocks shared;
  MemoryStats stats;
  UseByLayer use;
  // The breakdown at the peak is taken when memory first falls after it: until then use only grew.
  mutable UseByLayer peak_use;
  mutable ByCategory at_peak{};
  mutable bool peak_is_now = true;
  int64_t limit = 0;
  std::vector<MemoryEvent> ring;  // event n is at n % capacity
  int64_t ring_capacity = 0, events = 0;
  bool recording = false;

  PoolStats& pool_stats(bool small) { return small ? stats.small : stats.large; }

  // Counts a pool's free block in (sign 1) or out (sign -1).
  void hold(const Block& b, int64_t sign) {
    stats.held += sign * b.size;
    pool_stats(b.small).held += sign * b.size;
  }

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

  static Block* find_free(FreeBlocks& blocks, int64_t size, bool small) {
    Block wanted{.address = nullptr, .size = size, .small = small, .owner = &blocks};
    const auto it = blocks.of(small).lower_bound(&wanted);
    return it == blocks.of(small).end() ? nullptr : *it;
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
    auto block = std::make_unique<Block>(
        Block{.address = static_cast<char*>(memory), .size = bytes, .small = small, .owner = &shared});
    pool_stats(small).reserved += bytes;
    stats.reserved += bytes;
    stats.peak_reserved = std::max(stats.peak_reserved, stats.reserved);
    ++stats.device_allocations;
    shared.of(small).insert(block.get());
    return block.release();
  }

  int64_t release_cached() {
    int64_t released = 0;
    for (auto* blocks : {&shared.small, &shared.large})
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
    auto* tail =
        new Block{.address = block->address + size, .size = rest, .small = block->small, .owner = block->owner};
    tail->before = block;
    tail->after = block->after;
    if (tail->after) tail->after->before = tail;
    block->after = tail;
    block->size = size;
    block->owner->of(block->small).insert(tail);
  }

  // Makes `b` free: joined with its owner's free blocks on both sides.
  void put_back(Block* b) {
    b->free = true;
    auto& blocks = b->owner->of(b->small);
    const auto joins = [&](const Block* neighbour) {
      return neighbour && neighbour->free && neighbour->owner == b->owner;
    };
    const auto absorb_next = [&] {
      Block* next = b->after;
      b->size += next->size;
      b->after = next->after;
      if (b->after) b->after->before = b;
      delete next;
    };
    if (joins(b->after)) {
      blocks.erase(b->after);
      absorb_next();
    }
    if (joins(b->before)) {
      b = b->before;
      blocks.erase(b);  // its size is about to change, and with it its place
      absorb_next();
    }
    blocks.insert(b);
  }

  static int64_t largest(const std::set<Block*, BySize>& blocks) {
    return blocks.empty() ? 0 : (*blocks.rbegin())->size;
  }
  int64_t largest_free() const { return std::max(largest(shared.small), largest(shared.large)); }

  // What would help, judged by what is held.
  std::string advice(int64_t bytes) const {
    const int64_t total = static_cast<int64_t>(device->total()), idle = stats.reserved - stats.allocated - stats.held;
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
    if (stats.held > 0) held += fmt::format("{}for captured steps {}", held.empty() ? "" : ", ", human(stats.held));
    const int64_t idle = stats.reserved - stats.allocated - stats.held;
    fail(Fault::device,
         "out of memory on {}: {} asked for {}{}{}; {} is held ({}), {} reserved of {}{}, {} of it idle with {} in one "
         "piece; {}",
         device->name(), human(bytes), name_of(scope_category), *scope_layer ? " of " : "", scope_layer,
         human(stats.allocated + stats.held), held.empty() ? "nothing" : held, human(stats.reserved), human(device->total()),
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
  for (const auto* blocks : {&core_->shared.small, &core_->shared.large})
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
  MemoryPool::Blocks* const pool = pool_in_use && &pool_in_use->allocator_ == this ? pool_in_use->blocks_.get() : nullptr;
  Block* block = pool ? Core::find_free(*pool, size, small) : nullptr;
  if (!block) block = Core::find_free(c.shared, size, small);
  if (!block) block = c.take_segment(size, small);
  if (!block) c.out_of_memory(bytes);
  block->owner->of(small).erase(block);
  c.split(block, size);
  block->free = false;
  if (pool) {
    if (block->owner == pool) c.hold(*block, -1);
    block->owner = pool;
    ++pool->live;
  }
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
  if (b->owner != &c.shared) {
    c.hold(*b, 1);
    --static_cast<MemoryPool::Blocks*>(b->owner)->live;
  }
  c.put_back(b);
}

bool CachingAllocator::relabel(void* p, Category category, const char* layer) {
  Core& c = *core_;
  const std::lock_guard lock(c.mutex);
  const auto it = c.live.find(p);
  if (it == c.live.end()) return false;
  Block* b = it->second;
  c.account(*b, -1);
  b->category = category;
  b->layer = layer;
  c.account(*b, 1);
  int64_t& peak = c.stats.peak[static_cast<int>(category)];
  peak = std::max(peak, c.stats.current[static_cast<int>(category)]);
  return true;
}

MemoryStats CachingAllocator::stats() const {
  const std::lock_guard lock(core_->mutex);
  core_->keep_peak();
  MemoryStats s = core_->stats;
  s.at_peak = core_->at_peak;
  s.largest_free = core_->largest_free();
  s.small.free_blocks = static_cast<int64_t>(core_->shared.small.size());
  s.small.largest_free = Core::largest(core_->shared.small);
  s.large.free_blocks = static_cast<int64_t>(core_->shared.large.size());
  s.large.largest_free = Core::largest(core_->shared.large);
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

MemoryPool::MemoryPool(CachingAllocator& allocator) : allocator_(allocator), blocks_(std::make_unique<Blocks>()) {}

MemoryPool::~MemoryPool() {
  CachingAllocator::Core& c = *allocator_.core_;
  const std::lock_guard lock(c.mutex);
  for (const auto& [address, block] : c.live)
    if (block->owner == blocks_.get()) block->owner = &c.shared;
  for (auto* blocks : {&blocks_->small, &blocks_->large})
    for (Block* block : *blocks) {
      c.hold(*block, -1);
      block->owner = &c.shared;
      c.put_back(block);
    }
}

int64_t MemoryPool::live_blocks() const {
  const std::lock_guard lock(allocator_.core_->mutex);
  return blocks_->live;
}

MemoryPool::Use::Use(MemoryPool& pool) : before_(pool_in_use) { pool_in_use = &pool; }
MemoryPool::Use::~Use() { pool_in_use = before_; }

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
