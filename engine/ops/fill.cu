// In place: x = 0, x = value, x = std * normal.
#include <cstring>

#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Constant {
  double value;
  WEFT_HD double operator()(int64_t) const { return value; }
};
struct Normal {
  float std;
  RngKey key;
  WEFT_HD float operator()(int64_t i) const { return std * random_normal(key.at_step(), static_cast<uint64_t>(i)); }
};

template <class F>
void fill_with(const Tensor& x, const F& f) {
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { map_indices(device, x.numel(), f, x.data<T>()); });
  });
}

void clear(Cpu, void* p, int64_t bytes) { std::memset(p, 0, static_cast<size_t>(bytes)); }
#if WEFT_CUDA
void clear(Cuda, void* p, int64_t bytes) {
  cuda_check(cudaMemsetAsync(p, 0, static_cast<size_t>(bytes), compute_stream()), "memset");
}
#endif

}  // namespace

void zero(const Tensor& x) {
  if (x.bytes() == 0) return;
  on_device(x.device(), [&](auto device) { clear(device, x.raw(), x.bytes()); });
}

void fill(const Tensor& x, double value) { fill_with(x, Constant{value}); }

void fill_normal(const Tensor& x, double std, RngKey key) { fill_with(x, Normal{static_cast<float>(std), key}); }

}  // namespace weft
