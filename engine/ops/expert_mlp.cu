// Of each row r of an expert: h = up x_r, a = w_r dropout(silu(h)), y_r = down a, w_r the routing weight. With it
// inside of a, the sum of a token's rows is all that is left to do, and no expert's output is saved. Saved are x_r, h
// and a; backward, with da = down^T dy, dh = w_r silu'(h) dropout(da) and dw_r = sum_j da_j dropout(silu(h_j)).
#include <algorithm>

#include "engine/cpu/exp.h"
#include "engine/ops/grouped_matmul_kernels.h"
#include "engine/ops/masked.h"
#include "engine/ops/routing.h"
#if WEFT_CUDA
#include "engine/cuda/block_sum.h"
#endif

namespace weft {
namespace {

// How rows of h are activated; of which type the weights are depends on x.
template <class A>
struct Activation {
  const A* weights;        // [N, K]
  const int32_t* sources;  // [N*K]: row -> choice
  Mask mask;
  A scale;  // of what is kept
  int64_t rows, width;
};

// In bf16 by the GPU's approximation of tanh: one special function an element where exp and the division are two, 12
// us of 73 forward in the kernel of a warp a row that was here first. Against exact values silu is off by at most
// 1e-5, by 1e-4 of itself above -7 and by 1.4e-2 of itself above -12; bf16 rounds by 4e-3 at most.
template <class T, class A = acc_t<T>>
WEFT_HD A sigmoid(A x) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, bf16>) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(0.5f * x));
    return 0.5f * t + 0.5f;
  }
#endif
  return 1 / (1 + loop_exp(-x));
}
template <class T, class A = acc_t<T>>
WEFT_HD A activate(A h, A weight, bool kept) {
  const A a = weight * (h * sigmoid<T>(h));
  return kept ? a : A(0);
}
// h becomes dh; returns this element's part of dw.
template <class T, class A = acc_t<T>>
WEFT_HD A activate_backward(A da, A& h, A weight, bool kept) {
  const A s = sigmoid<T>(h), silu = h * s, d = kept ? da : A(0);
  h = weight * d * (s + silu * (1 - s));
  return d * silu;
}

template <class T, class A>
WEFT_WIDEST void activate_drawn(const uint16_t* halves, uint32_t threshold, A weight, int64_t n, const T* h, T* a) {
  for (int64_t i = 0; i < n; ++i) a[i] = T(activate<T>(A(h[i]), weight, halves[i] < threshold));
}
template <class T, class A>
WEFT_WIDEST A activate_backward_drawn(const uint16_t* halves, uint32_t threshold, A weight, int64_t n, const T* h,
                                      const T* da, T* dh) {
  constexpr int64_t kSums = 16;  // side by side
  A sums[kSums] = {}, total = 0;
  const auto one = [&](int64_t i) {
    A value = A(h[i]);
    const A part = activate_backward<T>(A(da[i]), value, weight, halves[i] < threshold);
    dh[i] = T(value);
    return part;
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
#pragma GCC ivdep
    for (int64_t j = 0; j < kSums; ++j) sums[j] += one(i + j);
  for (; i < n; ++i) total += one(i);
  for (const A sum : sums) total += sum;
  return total;
}

template <class A>
WEFT_HD Mask drawn_mask(const Activation<A>& f) {
  Mask mask = f.mask;
  mask.key = mask.key.at_step();
  return mask;
}

template <class T, class A>
void forward(Cpu, const Activation<A>& f, const T* h, T* a) {
  parallel_for(f.rows, std::max<int64_t>(1, 4096 / (f.width + 1)), [=](int64_t from, int64_t to) {
    const Mask mask = drawn_mask(f);
    for (int64_t row = from; row < to; ++row) {
      const A weight = f.scale * f.weights[f.sources[row]];
      for_drawn(mask, row * f.width, (row + 1) * f.width, [&](int64_t first, int64_t n, const uint16_t* halves) {
        activate_drawn(halves, mask.threshold, weight, n, h + first, a + first);
      });
    }
  });
}
template <class T, class A>
void backward(Cpu, const Activation<A>& f, const T* da, const T* h, T* dh, A* dweights) {
  parallel_for(f.rows, std::max<int64_t>(1, 4096 / (f.width + 1)), [=](int64_t from, int64_t to) {
    const Mask mask = drawn_mask(f);
    for (int64_t row = from; row < to; ++row) {
      const A weight = f.scale * f.weights[f.sources[row]];
      A dot = 0;
      for_drawn(mask, row * f.width, (row + 1) * f.width, [&](int64_t first, int64_t n, const uint16_t* halves) {
        dot += activate_backward_drawn(halves, mask.threshold, weight, n, h + first, da + first, dh + first);
      });
      dweights[f.sources[row]] = f.scale * dot;
    }
  });
}

#if WEFT_CUDA
// A row a block: at 16384 rows of 3072 in bf16 55 us forward and 77 us backward in the steps of an H200. The last row
// comes first: the product before wrote it last, so that a part of h or da is still in the L2 cache, and then a part of
// a is for the product after, which begins with the first row; alone, between products, it is 47 and 62 us.
constexpr int kThreads = 128, kStep = kThreads * 8;  // elements that a block takes at once, 8 a thread: one drawing's

// kWhole: rows are whole packs at addresses for 16 bytes.
template <bool kWhole, class T>
__global__ void __launch_bounds__(kThreads, 12) activate_rows(Activation<float> f, const T* h, T* a) {
  const int64_t row = gridDim.x - 1 - blockIdx.x;
  const int width = static_cast<int>(f.width);
  const Mask mask = drawn_mask(f);
  const float weight = f.scale * f.weights[f.sources[row]];
  h += row * f.width, a += row * f.width;
  for (int column = threadIdx.x * 8; column < width; column += kStep) {
    const auto pack = load_part<kWhole, 8>(h + column, width - column);
    const uint32_t kept = kept_bits<kWhole>(mask, row * f.width + column);
    float values[8];
    widen(pack, values);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = activate<T>(values[j], weight, kept >> j & 1);
    store_part<kWhole>(a + column, narrow<T>(values), width - column);
  }
}
template <bool kWhole, class T>
__global__ void __launch_bounds__(kThreads, 10) activate_rows_backward(Activation<float> f, const T* da, const T* h,
                                                                       T* dh, float* dweights) {
  const int64_t row = gridDim.x - 1 - blockIdx.x;
  const int width = static_cast<int>(f.width);
  const Mask mask = drawn_mask(f);
  const float weight = f.scale * f.weights[f.sources[row]];
  h += row * f.width, da += row * f.width, dh += row * f.width;
  float dot = 0;
  for (int column = threadIdx.x * 8; column < width; column += kStep) {
    const auto pack = load_part<kWhole, 8>(h + column, width - column);
    const auto gradient = load_part<kWhole, 8>(da + column, width - column);
    const uint32_t kept = kept_bits<kWhole>(mask, row * f.width + column);
    float x[8], d[8];
    widen(pack, x);
    widen(gradient, d);
#pragma unroll
    for (int j = 0; j < 8; ++j) dot += activate_backward<T>(d[j], x[j], weight, kept >> j & 1);
    store_part<kWhole>(dh + column, narrow<T>(x), width - column);
  }
  dot = block_sum<kThreads>(dot);
  if (threadIdx.x == 0) dweights[f.sources[row]] = f.scale * dot;
}

template <class... P>
bool whole(const Activation<float>& f, const P*... p) {
  return f.width % 8 == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}
template <class T>
void forward(Cuda, const Activation<float>& f, const T* h, T* a) {
  launch_blocks(whole(f, h, a) ? activate_rows<true, T> : activate_rows<false, T>, static_cast<unsigned>(f.rows),
                kThreads, 0, f, h, a);
}
template <class T>
void backward(Cuda, const Activation<float>& f, const T* da, const T* h, T* dh, float* dweights) {
  launch_blocks(whole(f, da, h, dh) ? activate_rows_backward<true, T> : activate_rows_backward<false, T>,
                static_cast<unsigned>(f.rows), kThreads, 0, f, da, h, dh, dweights);
}
#endif

// Calls f(device, activation of the right type, T()).
template <class F>
void with_activation(const Tensor& h, const Tensor& weights, const Routing& r, double p, RngKey key, const F& f) {
  on_device(h.device(), [&](auto device) {
    dispatch(device, h.dtype(), [&]<class T>() {
      using A = acc_t<T>;
      const Mask mask(key, p);
      f(device, Activation<A>{.weights = weights.data<A>(), .sources = r.sources.data<int32_t>(), .mask = mask,
                              .scale = A(mask.scale()), .rows = h.size(0), .width = h.size(1)}, T{});
    });
  });
}

}  // namespace

Tensor expert_mlp(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& weights, const Routing& r,
                  double p, RngKey key) {
  const RoutingSize s = size_of_routing("expert_mlp", x, r);
  const DType wide = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
  check(x.rank() == 2 && x.size(0) == s.tokens && up.rank() == 3 && up.size(0) == s.experts &&
            up.size(2) == x.size(1) && down.shape() == Shape({s.experts, x.size(1), up.size(1)}) &&
            up.dtype() == x.dtype() && down.dtype() == x.dtype() && weights.shape() == r.slots.shape() &&
            weights.dtype() == wide,
        "expert_mlp needs x [{0}, D], up [{1}, F, D], down [{1}, D, F] of one dtype and weights {2} of {3}, found {4}, "
        "{5}, {6} and {7} of {8}",
        s.tokens, s.experts, r.slots.shape().str(), name_of(wide), x.shape().str(), up.shape().str(),
        down.shape().str(), weights.shape().str(), name_of(weights.dtype()));
  check(up.device() == x.device() && down.device() == x.device() && weights.device() == x.device(),
        "expert_mlp needs x, up, down and weights on one device, found {}, {}, {} and {}", name_of(x.device()),
        name_of(up.device()), name_of(down.device()), name_of(weights.device()));
  check(p >= 0 && p < 1, "expert_mlp's probability of dropout must be in [0, 1), found {}", p);
  const int64_t rows = s.tokens * s.chosen;
  check_grouped_sizes("expert_mlp", rows, up);
  Tensor h = Tensor::like(x, {rows, up.size(1)}), y = Tensor::like(x, {rows, x.size(1)});
  // Kept: 25 MB a layer at 16384 rows of 768 in bf16, where gathering them again takes 12 us on an H200, and 100 MB,
  // where making a again backward takes 19 us.
  const Tensor gathered = gather_rows(x.detached(), r), a = Tensor::like(h);
  multiply_grouped(GroupedProduct::forward, gathered, up, h, r.offsets);
  with_activation(h, weights, r, p, key, [&]<class T>(auto device, const auto& activation, T) {
    forward(device, activation, h.data<T>(), a.data<T>());
  });
  multiply_grouped(GroupedProduct::forward, a, down, y, r.offsets);
  return record(
      "expert_mlp", y, {x, up, down, weights},
      [gathered, up = up.detached(), down = down.detached(), weights = weights.detached(), h, a, r, p, key,
       x_node = x.node()](const Tensor& dy) -> Gradients {
        Tensor dup = Tensor::like(up), ddown = Tensor::like(down);
        const Tensor dweights = Tensor::like(weights);
        multiply_grouped(GroupedProduct::weight_gradient, dy, a, ddown, r.offsets);
        Tensor da = a.sole_owner() ? a : Tensor::like(a);
        const Tensor dh = h.sole_owner() ? h : Tensor::like(h);
        multiply_grouped(GroupedProduct::input_gradient, dy, down, da, r.offsets);
        with_activation(h, weights, r, p, key, [&]<class T>(auto device, const auto& activation, T) {
          backward(device, activation, da.data<T>(), h.data<T>(), dh.data<T>(), dweights.data<acc_t<T>>());
        });
        multiply_grouped(GroupedProduct::weight_gradient, dh, gathered, dup, r.offsets);
        Tensor dgathered = gathered.sole_owner() ? gathered : Tensor::like(gathered);
        multiply_grouped(GroupedProduct::input_gradient, dh, up, dgathered, r.offsets);
        Tensor dx;
        if (x_node && !x_node->grad && !x_node->owed.sum)  // the router's gradient adds it up along with its own
          x_node->owed = {dgathered, r.slots, [dgathered, r] { return sum_rows(dgathered, r); }};
        else if (x_node)
          dx = sum_rows(dgathered, r);
        return {dx, dup, ddown, dweights};
      });
}

}  // namespace weft
