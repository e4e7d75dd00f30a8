// A device whose memory does not exist, for the tests of the caching allocator, and what those check of its sums.
#pragma once
#include <doctest/doctest.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "engine/allocator.h"
#include "engine/check.h"

namespace weft {

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

inline std::unique_ptr<DeviceMemory> fake(Log& log) { return std::make_unique<FakeMemory>(log); }

inline int64_t sum(const ByCategory& c) { return std::accumulate(c.begin(), c.end(), int64_t{0}); }

inline int64_t sum(const std::vector<LayerUse>& layers) {
  return std::accumulate(layers.begin(), layers.end(), int64_t{0}, [](int64_t n, auto& l) { return n + l.bytes; });
}

// The message of the Fault::device that asking for `bytes` throws; "" when it is served.
inline std::string refusal(CachingAllocator& a, int64_t bytes) {
  try {
    a.allocate(bytes);
    return "";
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::device);
    return e.what();
  }
}

inline void check_empty(const MemoryStats& s) {
  CHECK(s.requested == 0);
  CHECK(s.allocated == 0);
  CHECK(sum(s.current) == 0);
  CHECK(s.small.allocated == 0);
  CHECK(s.large.allocated == 0);
}

inline bool sums_hold(const MemoryStats& s) {
  return sum(s.current) == s.allocated && sum(s.at_peak) == s.peak_allocated && s.requested <= s.allocated &&
         s.allocated <= s.reserved && s.small.allocated + s.large.allocated == s.allocated &&
         s.small.reserved + s.large.reserved == s.reserved && s.allocated + s.held <= s.reserved &&
         s.small.held + s.large.held == s.held;
}

}  // namespace weft
