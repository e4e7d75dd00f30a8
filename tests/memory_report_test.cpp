// The text of the memory report and the CSV of the timeline, of an allocator whose blocks are known.
#include "engine/memory_report.h"

#include <doctest/doctest.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>

using namespace weft;

namespace {

constexpr int64_t kMiB = 1 << 20;

class Heap : public DeviceMemory {
 public:
  void* allocate(size_t bytes) override { return std::aligned_alloc(512, bytes); }
  void release(void* p) noexcept override { std::free(p); }
  size_t total() const override { return size_t{1} << 40; }
  std::string name() const override { return "the heap"; }
};

void* take(CachingAllocator& a, Category category, const char* layer, int64_t bytes) {
  const MemoryScope scope(category, layer);
  return a.allocate(bytes);
}

void check_has(const std::string& text, std::initializer_list<const char*> lines) {
  CAPTURE(text);
  for (const char* line : lines) {
    CAPTURE(line);
    CHECK(text.find(line) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("a report of nothing") {
  const CachingAllocator a(std::make_unique<Heap>());
  check_has(memory_report(a), {"allocated, after rounding           0.00        0.00\n", "0 blocks handed out"});
  CHECK(timeline_csv(a) == "sequence,bytes,category,layer,allocated\n");
  CHECK(fragmentation(a.stats()) == 0);
}

TEST_CASE("a report says who held the peak") {
  CachingAllocator a(std::make_unique<Heap>());
  void* weights = take(a, Category::parameter, "head", 12 * kMiB);
  void* first = take(a, Category::activation, "layers.0", 16 * kMiB);
  void* second = take(a, Category::activation, "layers.1", 32 * kMiB);
  void* other = take(a, Category::data, "", 4 * kMiB);
  a.free(first);
  a.free(second);
  check_has(memory_report(a), {
      "allocated, after rounding          16.00       64.00\n",
      "4 blocks handed out, 4 segments taken",
      "parameter                          12.00    18.8           12.00\n",
      "activation                         48.00    75.0           48.00\n",
      "layers.1                    activation         32.00    50.0\n",
      "(no layer)                  data                4.00     6.2\n",
      // free: 16 and 32 MiB, and 16 MiB behind the 4 MiB of data in their 20 MiB segment
      "larger                 16.00       80.00           3         32.00           50.0%\n",
  });
  CHECK(fragmentation(a.stats()) == doctest::Approx(0.5));
  check_has(memory_report(a, 1), {"(3 more)                                       32.00    50.0\n"});
  CHECK(memory_report(a, 1).find("layers.0") == std::string::npos);
  a.free(weights);
  a.free(other);
}

TEST_CASE("the timeline as CSV") {
  CachingAllocator a(std::make_unique<Heap>());
  a.start_timeline(10);
  void* p = take(a, Category::gradient, "layers.0", 1000);
  a.free(take(a, Category::workspace, "odd, \"name\"", 512));
  CHECK(timeline_csv(a) ==
        "sequence,bytes,category,layer,allocated\n"
        "0,1024,gradient,layers.0,1024\n"
        "1,512,workspace,\"odd, \"\"name\"\"\",1536\n"
        "2,-512,workspace,\"odd, \"\"name\"\"\",1024\n");
  a.free(p);
}
