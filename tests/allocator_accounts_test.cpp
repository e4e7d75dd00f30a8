// What the caching allocator counts by category, layer and event, and what it does and says when its device refuses.
#include <doctest/doctest.h>

#include <map>
#include <string>
#include <thread>
#include <vector>

#include "tests/fake_memory.h"

using namespace weft;

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
