// The caching allocator's blocks over a fake device: its tables of sizes, a naive model beside it, pools and threads.
#include "engine/allocator.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "tests/fake_memory.h"

using namespace weft;

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
