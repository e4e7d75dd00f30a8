// The caching allocator over a fake device: its tables of sizes, a naive model beside it, and a device that refuses.
#include "engine/allocator.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <thread>

#include "engine/check.h"

using namespace weft;

namespace {

constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20;

// What the fake device did; outlives the allocator that owns the device.
struct Log {
  std::map<char*, int64_t> segments;
  int64_t calls = 0, fail_at = -1;  // call fail_at (from 0) fails by itself
  int64_t capacity = int64_t{1} << 40, elsewhere = 0;  // what is for us, and what other programs hold
  int64_t held() const {
    int64_t bytes = 0;
    for (const auto& [address, size] : segments) bytes += size;
    return bytes;
  }
};

// Hands out addresses that no memory stands behind: the allocator must not touch what it manages.
class FakeMemory : public DeviceMemory {
 public:
  explicit FakeMemory(Log& log) : log_(log) {}
  void* allocate(size_t bytes) override {
    const int64_t size = static_cast<int64_t>(bytes);
    if (log_.calls++ == log_.fail_at || log_.held() + size > log_.capacity) return nullptr;
    char* p = reinterpret_cast<char*>(next_);
    next_ += bytes + 4096;  // segments never touch, so joining across them would show
    log_.segments[p] = size;
    return p;
  }
  void release(void* p) noexcept override { released_foreign_ |= log_.segments.erase(static_cast<char*>(p)) == 0; }
  size_t total() const override { return static_cast<size_t>(log_.capacity + log_.elsewhere); }
  std::string name() const override { return "the fake device"; }
  ~FakeMemory() override {
    if (released_foreign_) std::abort();
  }

 private:
  Log& log_;
  uintptr_t next_ = uintptr_t{1} << 32;
  bool released_foreign_ = false;
};

std::unique_ptr<DeviceMemory> fake(Log& log) { return std::make_unique<FakeMemory>(log); }

int64_t sum(const ByCategory& c) { return std::accumulate(c.begin(), c.end(), int64_t{0}); }

int64_t sum(const std::vector<LayerUse>& layers) {
  return std::accumulate(layers.begin(), layers.end(), int64_t{0}, [](int64_t n, auto& l) { return n + l.bytes; });
}

// The message of the Fault::device that asking for `bytes` throws; "" when it is served.
std::string refusal(CachingAllocator& a, int64_t bytes) {
  try {
    a.allocate(bytes);
    return "";
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::device);
    return e.what();
  }
}

void check_empty(const MemoryStats& s) {
  CHECK(s.requested == 0);
  CHECK(s.allocated == 0);
  CHECK(sum(s.current) == 0);
  CHECK(s.small.allocated == 0);
  CHECK(s.large.allocated == 0);
}

bool sums_hold(const MemoryStats& s) {
  return sum(s.current) == s.allocated && sum(s.at_peak) == s.peak_allocated && s.requested <= s.allocated &&
         s.allocated <= s.reserved && s.small.allocated + s.large.allocated == s.allocated &&
         s.small.reserved + s.large.reserved == s.reserved && s.allocated + s.held <= s.reserved &&
         s.small.held + s.large.held == s.held;
}

}  // namespace

TEST_CASE("a block is rounded to 512 bytes and comes from its size's segment") {
  struct Row {
    int64_t asked, allocated, reserved;
  };
  for (const Row row : {Row{1, 512, 2 * kMiB}, {512, 512, 2 * kMiB}, {513, 1024, 2 * kMiB}, {kMiB, kMiB, 2 * kMiB},
                        {kMiB + 1, kMiB + 512, 20 * kMiB}, {10 * kMiB, 10 * kMiB, 20 * kMiB},
                        {10 * kMiB + 1, 10 * kMiB + 512, 12 * kMiB},
                        // the rest of a large segment up to 1 MiB stays with the block
                        {11 * kMiB - 512, 11 * kMiB - 512, 12 * kMiB}, {11 * kMiB, 12 * kMiB, 12 * kMiB},
                        {100 * kMiB, 100 * kMiB, 100 * kMiB}}) {
    CAPTURE(row.asked);
    Log log;
    CachingAllocator a(fake(log));
    void* p = a.allocate(row.asked);
    CHECK(reinterpret_cast<uintptr_t>(p) % 512 == 0);
    const MemoryStats s = a.stats();
    CHECK(s.requested == row.asked);
    CHECK(s.allocated == row.allocated);
    CHECK(s.reserved == row.reserved);
    CHECK(log.held() == row.reserved);
    a.free(p);
    check_empty(a.stats());
    CHECK(a.stats().largest_free == row.reserved);
    a.release_cached();
    CHECK(log.segments.empty());
  }
}

TEST_CASE("freed neighbours merge, in every order") {
  for (std::vector<int> order : {std::vector{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}) {
    Log log;
    CachingAllocator a(fake(log));
    std::vector<void*> p;
    for (int i = 0; i < 3; ++i) p.push_back(a.allocate(100 * kKiB));
    CHECK(a.stats().small.free_blocks == 1);
    for (const int i : order) a.free(p[static_cast<size_t>(i)]);
    const MemoryStats s = a.stats();
    CHECK(s.small.free_blocks == 1);
    CHECK(s.small.largest_free == 2 * kMiB);
    CHECK(s.device_allocations == 1);
  }
}

TEST_CASE("the best fitting free block serves, and a repeated step takes nothing from the device") {
  Log log;
  CachingAllocator a(fake(log));
  void* big = a.allocate(40 * kMiB);
  void* fit = a.allocate(16 * kMiB);
  a.free(big);
  a.free(fit);
  CHECK(a.allocate(15 * kMiB + 512 * kKiB) == fit);
  a.free(fit);
  const int64_t calls = log.calls;
  for (int step = 0; step < 3; ++step) {
    void *x = a.allocate(40 * kMiB), *y = a.allocate(16 * kMiB);
    a.free(x);
    a.free(y);
  }
  CHECK(log.calls == calls);
}

TEST_CASE("sizes that are none") {
  Log log;
  CachingAllocator a(fake(log));
  CHECK(a.allocate(0) == nullptr);
  a.free(nullptr);
  CHECK(a.stats().allocations == 0);
  for (const int64_t bytes : {int64_t{-1}, std::numeric_limits<int64_t>::min()})
    CHECK_THROWS_WITH_AS(a.allocate(bytes), doctest::Contains("at least 0 bytes"), Error);
  CHECK(refusal(a, std::numeric_limits<int64_t>::max()).find("out of memory") == 0);
  CHECK(refusal(a, std::numeric_limits<int64_t>::max() - 511) != "");
  CHECK(log.calls == 0);
  check_empty(a.stats());
}

TEST_CASE("a million random operations beside a naive model") {
  constexpr const char* kLayers[] = {"", "layers.0.attention", "layers.1.ffn", "head"};
  Log log;
  CachingAllocator a(fake(log));
  struct Live {
    char* p;
    int64_t asked, size;
    int category, layer;
  };
  auto pool = std::make_unique<MemoryPool>(a);  // serves a third of the operations
  std::vector<Live> live;
  std::map<char*, int64_t> extent;  // by address, of what was asked
  ByCategory now{}, own_peak{}, peak_moment{};
  std::array<std::array<int64_t, 4>, kCategories> by_layer{}, layer_moment{};
  int64_t requested = 0, allocated = 0, peak = 0, wrong = 0;
  const auto need = [&](bool ok, const char* what, int operation) {
    if (!ok && ++wrong < 5) FAIL_CHECK(what, " at operation ", operation);
  };
  std::mt19937_64 random(7);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const auto free_one = [&](size_t i) {
    const Live b = live[i];
    live[i] = live.back();
    live.pop_back();
    extent.erase(b.p);
    a.free(b.p);
    now[static_cast<size_t>(b.category)] -= b.size;
    by_layer[static_cast<size_t>(b.category)][static_cast<size_t>(b.layer)] -= b.size;
    requested -= b.asked;
    allocated -= b.size;
  };
  for (int i = 0; i < 1'000'000; ++i) {
    // The target swells and shrinks, so that peaks come late and segments empty.
    const size_t target = static_cast<size_t>(20 + 500 * (i % 100'000) / 100'000 + i / 5'000);
    if (!live.empty() && (live.size() > target || below(5) < 2)) {
      free_one(static_cast<size_t>(below(static_cast<int64_t>(live.size()))));
    } else {
      const int64_t kind = below(20);
      const int64_t asked = 1 + below(kind < 14 ? 64 * kKiB : kind < 17 ? 2 * kMiB : kind < 19 ? 10 * kMiB : 40 * kMiB);
      const int category = static_cast<int>(below(kCategories)), layer = static_cast<int>(below(4));
      const MemoryScope scope(static_cast<Category>(category), kLayers[layer]);
      std::optional<MemoryPool::Use> use;
      if (i % 3 == 0) use.emplace(*pool);
      char* p = static_cast<char*>(a.allocate(asked));
      use.reset();
      const auto after = extent.lower_bound(p);
      need(after == extent.end() || p + asked <= after->first, "a block overlaps the next", i);
      if (after != extent.begin()) {
        const auto before = std::prev(after);
        need(before->first + before->second <= p, "a block overlaps the one before", i);
      }
      auto segment = log.segments.upper_bound(p);
      need(segment != log.segments.begin(), "a block lies before every segment", i);
      --segment;
      need(p + asked <= segment->first + segment->second, "a block leaves its segment", i);
      extent[p] = asked;
      // How much the allocator gave is its own affair, within a bound; everything else must follow from it.
      const int64_t size = a.stats().allocated - allocated;
      need(size >= asked && size < asked + 512 + (asked > kMiB - 512 ? kMiB : 0), "a block's size", i);
      live.push_back({p, asked, size, category, layer});
      int64_t& held = now[static_cast<size_t>(category)];
      held += size;
      own_peak[static_cast<size_t>(category)] = std::max(own_peak[static_cast<size_t>(category)], held);
      by_layer[static_cast<size_t>(category)][static_cast<size_t>(layer)] += size;
      requested += asked;
      allocated += size;
      if (allocated > peak) peak = allocated, peak_moment = now, layer_moment = by_layer;
    }
    const MemoryStats s = a.stats();
    need(s.current == now && s.peak == own_peak, "the sums by category and their peaks", i);
    need(s.requested == requested && s.allocated == allocated, "the sums", i);
    need(s.peak_allocated == peak && s.at_peak == peak_moment, "the breakdown at the peak", i);
    need(sums_hold(s), "sums that must agree", i);
    if (i % 1000 == 0) {
      need(s.reserved == log.held(), "reserved against the device", i);
      const std::vector<LayerUse> layers = a.layers_at_peak();
      need(sum(layers) == peak, "the layers' sum", i);
      for (const LayerUse& use : layers) {
        const auto layer = std::find(std::begin(kLayers), std::end(kLayers), use.layer) - std::begin(kLayers);
        need(layer < 4 && layer_moment[static_cast<size_t>(use.category)][static_cast<size_t>(layer)] == use.bytes,
             "a layer at the peak", i);
      }
    }
    if (i % 50'021 == 0) a.release_cached();
    if (i % 170'003 == 0) pool = std::make_unique<MemoryPool>(a);
  }
  CHECK(wrong == 0);
  pool.reset();
  while (!live.empty()) free_one(live.size() - 1);
  const MemoryStats s = a.stats();
  check_empty(s);
  CHECK(s.small.free_blocks + s.large.free_blocks == static_cast<int64_t>(log.segments.size()));
  CHECK(s.reserved == log.held());
  a.release_cached();
  CHECK(log.segments.empty());
  CHECK(a.stats().reserved == 0);
}

TEST_CASE("a pool's memory serves nothing else until the pool is gone") {
  Log log;
  CachingAllocator a(fake(log));
  a.free(a.allocate(64 * kMiB));  // idle memory, as a step leaves it
  std::map<char*, int64_t> pooled;
  auto pool = std::make_unique<MemoryPool>(a);
  void* kept = nullptr;
  const auto step = [&] {
    const MemoryPool::Use use(*pool);
    void *x = a.allocate(20 * kMiB), *y = a.allocate(100), *z = a.allocate(30 * kMiB);
    if (!kept) kept = a.allocate(1000);
    a.free(x);
    void* w = a.allocate(15 * kMiB);  // in x's place
    CHECK(w == x);
    pooled = {{static_cast<char*>(x), 20 * kMiB}, {static_cast<char*>(y), 512}, {static_cast<char*>(z), 30 * kMiB},
              {static_cast<char*>(kept), 1024}};
    for (void* p : {w, y, z}) a.free(p);
  };
  step();
  const auto first = pooled;
  CHECK(pool->live_blocks() == 1);
  CHECK(log.held() == (64 + 2) * kMiB);  // all but the first small block came from what was idle
  CHECK(a.stats().held == 50 * kMiB + 512);
  CHECK(a.stats().allocated == 1024);
  CHECK(a.stats().peak_allocated == 64 * kMiB);
  CHECK(a.stats().large.largest_free == 14 * kMiB);
  CHECK(sums_hold(a.stats()));
  step();  // finds its own memory again
  CHECK(pooled == first);
  CHECK(log.held() == (64 + 2) * kMiB);

  std::vector<void*> others;
  std::mt19937 random(5);
  for (int i = 0; i < 300; ++i) {
    const int64_t bytes = 1 + static_cast<int64_t>(random() % (i % 3 ? 1000 : 9 * kMiB));
    char* p = static_cast<char*>(a.allocate(bytes));
    others.push_back(p);
    for (const auto& [start, size] : pooled) CHECK((p + bytes <= start || start + size <= p));
  }
  CHECK(pool->live_blocks() == 1);
  CHECK(sums_hold(a.stats()));
  for (void* p : others) a.free(p);
  a.release_cached();
  CHECK(log.held() == (64 + 2) * kMiB);

  pool.reset();
  CHECK(a.stats().held == 0);
  CHECK(a.stats().large.largest_free == 64 * kMiB);  // one piece again
  CHECK(a.allocate(60 * kMiB) != nullptr);
  CHECK(log.held() == (64 + 2) * kMiB);
  a.free(kept);
  CHECK(sums_hold(a.stats()));
  CHECK(a.stats().small.free_blocks == 1);
}

TEST_CASE("a pool's use ends with its scope, is its thread's own, and concerns its allocator alone") {
  Log log, other_log;
  CachingAllocator a(fake(log)), other(fake(other_log));
  MemoryPool pool(a), second(a);
  {
    const MemoryPool::Use use(pool);
    {
      const MemoryPool::Use inner(second);
      a.free(a.allocate(512));
      CHECK(a.stats().held == 512);
      a.allocate(512);
      CHECK(second.live_blocks() == 1);
    }
    std::thread([&] { a.allocate(512); }).join();
    other.free(other.allocate(512));
    CHECK(pool.live_blocks() == 0);
    a.allocate(512);
    CHECK(pool.live_blocks() == 1);
  }
  a.allocate(512);
  CHECK(pool.live_blocks() == 1);
  CHECK(a.stats().held == 0);
  CHECK(other.stats().held == 0);
}

TEST_CASE("a peak that nobody looked at in between is the true one") {
  Log log;
  CachingAllocator a(fake(log));
  const auto take = [&](Category c, const char* layer, int64_t mib) {
    const MemoryScope scope(c, layer);
    return a.allocate(mib * kMiB);
  };
  void* weights = take(Category::parameter, "a", 20);
  void* activations = take(Category::activation, "b", 30);
  a.free(activations);
  void* gradients = take(Category::gradient, "a", 30);  // as high as before, but not higher
  CHECK(a.stats().at_peak[static_cast<int>(Category::activation)] == 30 * kMiB);
  CHECK(a.layers_at_peak().size() == 2);
  CHECK(a.layers_at_peak()[0].layer == "b");
  a.reset_peaks();
  a.free(gradients);
  const MemoryStats s = a.stats();
  CHECK(s.peak_allocated == 50 * kMiB);
  CHECK(s.at_peak[static_cast<int>(Category::gradient)] == 30 * kMiB);
  CHECK(s.peak[static_cast<int>(Category::activation)] == 0);
  a.free(weights);
}

TEST_CASE("a device that refuses its n-th allocation leaves everything right") {
  // A refusal is met in three ways: the cache is given back and the device asked again, it is asked for less, or the
  // caller hears of it. Whichever it was, the sums hold, and the next one succeeds.
  int64_t n = 0, refused = 0;
  for (bool reached = true; reached; ++n) {
    CAPTURE(n);
    Log log;
    log.fail_at = n;
    CachingAllocator a(fake(log));
    std::vector<void*> live;
    for (int i = 0; i < 40; ++i) {
      const int64_t bytes = 1 + (int64_t{i} * 7919 * kKiB) % (24 * kMiB);
      const MemoryStats before = a.stats();
      try {
        live.push_back(a.allocate(bytes));
      } catch (const Error& e) {
        ++refused;
        CHECK(e.fault() == Fault::device);
        const MemoryStats after = a.stats();
        CHECK(after.allocated == before.allocated);
        CHECK(after.requested == before.requested);
        CHECK(after.current == before.current);
        live.push_back(a.allocate(bytes));
      }
      CHECK(sums_hold(a.stats()));
      CHECK(a.stats().reserved == log.held());
      if (i % 3 == 2) {
        a.free(live[static_cast<size_t>(i / 2)]);
        live[static_cast<size_t>(i / 2)] = nullptr;
      }
    }
    for (void* p : live) a.free(p);
    check_empty(a.stats());
    a.release_cached();
    CHECK(log.segments.empty());
    reached = log.calls > n;
  }
  CHECK(n > 10);
  CHECK(refused > 0);
}

TEST_CASE("a full device: the cache is given back, then a smaller segment will do") {
  Log log;
  log.capacity = 64 * kMiB;
  CachingAllocator a(fake(log));
  a.free(a.allocate(40 * kMiB));
  void* p = a.allocate(60 * kMiB);
  REQUIRE(p);
  CHECK(a.stats().reserved == 60 * kMiB);
  void* q = a.allocate(3 * kMiB);  // not 20 MiB
  REQUIRE(q);
  CHECK(a.stats().reserved == 64 * kMiB);
  CHECK(refusal(a, 2 * kMiB) != "");
  a.free(p);
  a.free(q);
  CHECK(refusal(a, 64 * kMiB) == "");
}

TEST_CASE("a limit holds, and the refusal says what was asked, what is held and by which category") {
  Log log;
  CachingAllocator a(fake(log));
  CHECK_THROWS_AS(a.set_limit(-1), Error);
  a.set_limit(64 * kMiB);
  {
    const MemoryScope scope(Category::parameter);
    a.allocate(30 * kMiB);
  }
  {
    const MemoryScope scope(Category::gradient);
    a.allocate(12 * kMiB);
  }
  const MemoryScope scope(Category::workspace, "layers.3.ffn");
  const std::string text = refusal(a, 25 * kMiB);
  CAPTURE(text);
  for (const char* part : {"out of memory on the fake device", "25.00 MiB asked for workspace of layers.3.ffn",
                           "42.00 MiB is held", "parameter 30.00 MiB", "gradient 12.00 MiB", "limit of 64.00 MiB",
                           "raise the memory limit"}) {
    CAPTURE(part);
    CHECK(text.find(part) != std::string::npos);
  }
  CHECK(text.find("optimizer") == std::string::npos);
  a.set_limit(0);
  CHECK(refusal(a, 25 * kMiB) == "");
}

TEST_CASE("a refusal's advice follows from what is held") {
  const auto advice = [](CachingAllocator& a, int64_t bytes, const char* expected) {
    const std::string text = refusal(a, bytes);
    CAPTURE(text);
    CAPTURE(expected);
    CHECK(text.find(expected) != std::string::npos);
  };
  Log log;
  log.capacity = 64 * kMiB;
  CachingAllocator a(fake(log));
  advice(a, 3 * 1024 * kMiB, "3.00 GiB asked for activation; 0 B is held (nothing)");
  advice(a, 65 * kMiB, "more than the whole device: make the batch, the sequence or the model smaller");
  // 30 MiB in use, 30 in use and 4 that the device lost to another program
  void* first = a.allocate(30 * kMiB);
  void* second = a.allocate(30 * kMiB);
  log.capacity = 60 * kMiB;
  log.elsewhere = 4 * kMiB;
  advice(a, 3 * kMiB, "4.00 MiB of the device is held by the driver, libraries or other programs: make the batch or "
                      "the sequence smaller");
  advice(a, 700, "700 B asked");
  advice(a, 5 * kMiB, "in one piece; make the batch or the sequence smaller");
  a.free(first);
  a.free(second);
  // One segment of 60 MiB with a parameter at its start and one in its middle, so what is idle is in two pieces.
  a.release_cached();
  a.free(a.allocate(60 * kMiB));
  const MemoryScope scope(Category::parameter, "w");
  void* start = a.allocate(10 * kMiB);
  void* gap = a.allocate(20 * kMiB);
  void* middle = a.allocate(10 * kMiB);
  a.free(gap);
  advice(a, 30 * kMiB, "what is idle would do, but it is in pieces between blocks in use: make the model smaller");
  a.free(start);
  a.free(middle);
}

TEST_CASE("scopes nest, and each thread has its own") {
  Log log;
  CachingAllocator a(fake(log));
  const auto used = [&](Category c) { return a.stats().current[static_cast<int>(c)]; };
  a.allocate(512);
  CHECK(used(Category::activation) == 512);
  {
    const MemoryScope outer(Category::parameter, "outer");
    {
      const MemoryScope inner(Category::workspace);  // keeps the layer
      a.allocate(512);
      std::thread([&] { a.allocate(1024); }).join();
    }
    a.allocate(2048);
  }
  a.allocate(4096);
  CHECK(used(Category::workspace) == 512);
  CHECK(used(Category::parameter) == 2048);
  CHECK(used(Category::activation) == 512 + 1024 + 4096);
  std::map<std::string, int64_t> layers;
  for (const LayerUse& use : a.layers_at_peak()) layers[use.layer] += use.bytes;
  CHECK(layers == std::map<std::string, int64_t>{{"", 512 + 1024 + 4096}, {"outer", 512 + 2048}});
}

TEST_CASE("the same layer's name at two addresses is one layer") {
  Log log;
  CachingAllocator a(fake(log));
  static const char first[] = "ffn", second[] = "ffn";
  for (const char* name : {first, second}) {
    const MemoryScope scope(Category::activation, name);
    a.allocate(512);
  }
  CHECK(a.layers_at_peak().size() == 1);
}

TEST_CASE("several threads") {
  Log log;
  CachingAllocator a(fake(log));
  a.start_timeline(1000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&a, t] {
      const MemoryScope scope(static_cast<Category>(t));
      std::mt19937 random(static_cast<unsigned>(t));
      std::vector<void*> live;
      for (int i = 0; i < 5000; ++i) {
        if (live.size() > 20) {
          std::swap(live[random() % live.size()], live.back());
          a.free(live.back());
          live.pop_back();
        }
        live.push_back(a.allocate(1 + static_cast<int64_t>(random() % (3 * kMiB))));
        if (i % 500 == 0) {
          (void)a.layers_at_peak();
          (void)a.timeline();
          a.release_cached();
        }
      }
      for (void* p : live) a.free(p);
    });
  for (std::thread& t : threads) t.join();
  const MemoryStats s = a.stats();
  check_empty(s);
  CHECK(sums_hold(s));
  CHECK(s.allocations == 20'000);
  a.release_cached();
  CHECK(log.segments.empty());
}

TEST_CASE("the timeline keeps the newest events") {
  Log log;
  CachingAllocator a(fake(log));
  a.allocate(512);
  CHECK(a.timeline().empty());
  CHECK_THROWS_AS(a.start_timeline(0), Error);
  a.start_timeline(4);
  for (int i = 0; i < 3; ++i) {
    const MemoryScope scope(Category::data, "x");
    a.free(a.allocate(1000));
    if (i == 0) CHECK(a.timeline().size() == 2);
  }
  a.stop_timeline();
  a.allocate(512);
  const std::vector<MemoryEvent> events = a.timeline();
  REQUIRE(events.size() == 4);
  for (int64_t i = 0; i < 4; ++i) {
    const MemoryEvent& e = events[static_cast<size_t>(i)];
    CHECK(e.sequence == i + 2);
    CHECK(e.bytes == (i % 2 == 0 ? 1024 : -1024));
    CHECK(e.allocated == (i % 2 == 0 ? 512 + 1024 : 512));
    CHECK(e.category == Category::data);
    CHECK(std::string(e.layer) == "x");
  }
  a.start_timeline(4);
  CHECK(a.timeline().empty());
}

TEST_CASE("freeing twice, or what no block starts at, ends the process with a word") {
  for (const bool twice : {true, false}) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      dup2(ends[1], 2);
      std::signal(SIGABRT, SIG_DFL);  // past doctest, which would report a crash
      Log log;
      CachingAllocator a(fake(log));
      char* p = static_cast<char*>(a.allocate(1024));
      if (twice) a.free(p);
      a.free(twice ? p : p + 512);
      _exit(0);
    }
    close(ends[1]);
    std::string said(200, '\0');
    const ssize_t n = read(ends[0], said.data(), said.size());
    said.resize(n > 0 ? static_cast<size_t>(n) : 0);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    CAPTURE(said);
    CHECK(WIFSIGNALED(status));
    CHECK(WTERMSIG(status) == SIGABRT);
    CHECK(said.find("weft: bug:") == 0);
  }
}
