// Each pair (a, b) = (x[2i], x[2i+1]) of the last R columns becomes (a c - b s, a s + b c), with c and s = table[t, 2i]
// and table[t, 2i+1]; dx is dy turned back: the same with -s.
#include <algorithm>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

struct Sizes {
  int64_t tokens;  // B*T
  int64_t time;
  int64_t heads;
  int64_t width;    // of a head
  int64_t rotated;  // R
};

template <class T>
void rotate(Cpu, const T* x, const float* table, T* y, Sizes sizes, float direction) {
  using A = acc_t<T>;
  const auto [tokens, time, heads, width, rotated] = sizes;
  const int64_t kept = width - rotated;
  parallel_for(tokens, std::max<int64_t>(1, 4096 / (heads * width + 1)), [=](int64_t from, int64_t to) {
    for (int64_t row = from * heads; row < to * heads; ++row) {
      const float* angles = table + row / heads % time * rotated;
      for (int64_t i = 0; i < kept; ++i) y[row * width + i] = x[row * width + i];
      for (int64_t i = 0; i < rotated; i += 2) {
        const int64_t at = row * width + kept + i;
        const A a = x[at], b = x[at + 1], c = angles[i], s = angles[i + 1] * direction;
        y[at] = T(a * c - b * s);
        y[at + 1] = T(a * s + b * c);
      }
    }
  });
}

#if WEFT_CUDA
// One block per token, a pack at a time: a head's width and its kept columns are whole packs.
template <class T>
__global__ void rope_packs(const T* x, const float* table, T* y, Sizes sizes, float direction) {
  constexpr int kN = kPack<T>;
  const int width = static_cast<int>(sizes.width), kept = width - static_cast<int>(sizes.rotated);
  const float* angles = table + blockIdx.x % sizes.time * sizes.rotated;
  x += blockIdx.x * sizes.heads * width;
  y += blockIdx.x * sizes.heads * width;
  const int packs = width / kN, all = static_cast<int>(sizes.heads) * packs;
  for (int p = threadIdx.x; p < all; p += blockDim.x) {
    const int column = p % packs * kN;
    Pack<T, kN> pack = load_pack<kN>(x + p * kN, kN);
    if (column >= kept) {
      const auto cs = load_pack<kN>(angles + column - kept, kN);
#pragma unroll
      for (int i = 0; i < kN; i += 2) {
        const float a = pack.v[i], b = pack.v[i + 1], c = cs.v[i], s = cs.v[i + 1] * direction;
        pack.v[i] = T(a * c - b * s);
        pack.v[i + 1] = T(a * s + b * c);
      }
    }
    store_pack(y + p * kN, pack, kN);
  }
}
// The same for any width: a kept column or a pair at a time.
template <class T>
__global__ void rope_pairs(const T* x, const float* table, T* y, Sizes sizes, float direction) {
  const int width = static_cast<int>(sizes.width), kept = width - static_cast<int>(sizes.rotated);
  const float* angles = table + blockIdx.x % sizes.time * sizes.rotated;
  const int units = kept + static_cast<int>(sizes.rotated) / 2, all = static_cast<int>(sizes.heads) * units;
  for (int u = threadIdx.x; u < all; u += blockDim.x) {
    const int unit = u % units;
    const int64_t head = (blockIdx.x * sizes.heads + u / units) * width;
    if (unit < kept) {
      y[head + unit] = x[head + unit];
      continue;
    }
    const int i = (unit - kept) * 2;
    const int64_t at = head + kept + i;
    const float a = x[at], b = x[at + 1], c = angles[i], s = angles[i + 1] * direction;
    y[at] = T(a * c - b * s);
    y[at + 1] = T(a * s + b * c);
  }
}
template <class T>
void rotate(Cuda, const T* x, const float* table, T* y, Sizes sizes, float direction) {
  const bool whole_packs = sizes.width % kPack<T> == 0 && sizes.rotated % kPack<T> == 0;
  launch_blocks(whole_packs ? rope_packs<T> : rope_pairs<T>, static_cast<unsigned>(sizes.tokens),
                row_threads<T>(sizes.heads * sizes.width, 256), 0, x, table, y, sizes, direction);
}
#endif

Tensor rotated(const Tensor& x, const Tensor& table, float direction) {
  Tensor y = Tensor::like(x);
  const Sizes sizes{x.size(0) * x.size(1), x.size(1), x.size(2), x.size(3), table.size(1)};
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(),
             [&]<class T>() { rotate(device, x.data<T>(), table.data<float>(), y.data<T>(), sizes, direction); });
  });
  return y;
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& table) {
  check(x.rank() == 4 && table.rank() == 2 && table.dtype() == DType::f32 && table.device() == x.device() &&
            table.size(0) >= x.size(1) && table.size(1) <= x.size(3) && table.size(1) % 2 == 0,
        "rope needs x [B, T, H, D] and an f32 table [>=T, R <= D, even] on one device, found {} on {} and {} {} on {}",
        x.shape().str(), name_of(x.device()), name_of(table.dtype()), table.shape().str(), name_of(table.device()));
  check(x.size(2) * x.size(3) < INT32_MAX, "rope of {}: heads * width must be below 2^31", x.shape().str());
  return record("rope", rotated(x, table, 1), {x}, [table = table.detached()](const Tensor& dy) -> Gradients {
    return {rotated(dy, table, -1)};
  });
}

}  // namespace weft
