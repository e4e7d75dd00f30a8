// loss = mean over rows of (lse(z) - z[target]) with z = x w^T, for a vocabulary so large that z and its gradient
// should never exist whole. Rows go in chunks: their logits, then in one pass their losses and, over the logits, their
// gradient dz = (softmax(z) - 1 at the target) / rows, then dx = dz w and dw += dz^T x. So the gradients are made in
// the forward pass, for a loss that backward starts from with 1, and backward only multiplies them by what came.
#include <algorithm>
#include <cmath>

#include "engine/cpu/exp.h"
#include "engine/cpu/gemm.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#include "engine/cuda/tensor_core.h"
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

// Of rows [rows, v] of logits: each one's loss; whether its first largest logit is the target, where `hits` is given;
// and over the logits `scale` times the gradient of the losses' sum, where `gradient` says so.
template <class T, class A = acc_t<T>>
void row_losses(Cpu, T* z, const int32_t* targets, A* losses, int32_t* hits, int64_t rows, int64_t v, bool gradient,
                double scale) {
  parallel_for(rows, std::max<int64_t>(1, 1024 / v), [=](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      T* zr = z + row * v;
      const int64_t target = targets[row];
      const A at_target = zr[target];
      A largest = -INFINITY, total = 0;
      bool first = true;
      for (int64_t i = 0; i < v; ++i) {
        largest = std::max(largest, A(zr[i]));
        first = first && (i < target ? A(zr[i]) < at_target : A(zr[i]) <= at_target);
      }
      for (int64_t i = 0; i < v; ++i) total += loop_exp(A(zr[i]) - largest);
      const A lse = largest + std::log(total);
      losses[row] = lse - at_target;
      if (hits) hits[row] = first;
      if (gradient)
        for (int64_t i = 0; i < v; ++i)
          zr[i] = T(A(scale) * (loop_exp(A(zr[i]) - lse) - (i == target ? A(1) : A(0))));
    }
  });
}
template <class A>
void totals(Cpu, const A* losses, const int32_t* hits, A* loss, int32_t* correct, int64_t rows) {
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) total += losses[row];
  *loss = static_cast<A>(total / static_cast<double>(rows));
  if (!hits) return;
  *correct = 0;
  for (int64_t row = 0; row < rows; ++row) *correct += hits[row];
}
// y = s x, or y += s x.
template <class A, class X, class Y>
void scale_by(Cpu, const A* s, const X* x, Y* y, int64_t n, bool add) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) y[i] = Y((add ? A(y[i]) : A(0)) + *s * A(x[i]));
  });
}

#if WEFT_CUDA
constexpr int kThreads = 512;
constexpr int64_t kHeldBytes = 49152 * 2;  // of a row; two blocks stand on a multiprocessor

template <class T, int kN>
struct alignas(sizeof(T) * kN) Logits {
  T v[kN];
};

// One block per row, which it reads once: its first `held` packs of kN (16 bytes; 1 where that does not divide v, and
// then held is 0) wait in shared memory, where each thread meets only what it has brought. The others are read again.
// A target outside the vocabulary makes the row's loss and gradient nan.
template <class T, int kN, bool kGradient>
__global__ void __launch_bounds__(kThreads, 2) row_losses_kernel(T* z, const int32_t* targets, float* losses,
                                                                 int32_t* hits, int64_t v, int held, float scale) {
  using Chunk = Logits<T, kN>;
  constexpr float kLog2e = 1.4426950408889634f;
  extern __shared__ uint4 shared_row[];
  Chunk* const near = reinterpret_cast<Chunk*>(shared_row);
  Chunk* const row = reinterpret_cast<Chunk*>(z + blockIdx.x * v);
  const int chunks = static_cast<int>(v / kN), thread = threadIdx.x;
  if constexpr (kN > 1) {
#pragma unroll 4
    for (int at = thread; at < held; at += kThreads) copy_16_bytes(near + at, row + at, true);
    close_copies();
  }
  const int32_t target = targets[blockIdx.x];
  const bool known = target >= 0 && target < v;
  const float at_target = known ? float(z[blockIdx.x * v + target]) : NAN;
  if constexpr (kN > 1) wait_copies<0>();

  float largest = -INFINITY, total = 0;  // the sum is of 2^(x log2e - shift of `largest`)
  bool first = known;
  const auto count = [&](const Chunk& pack, int at) {
    float here = -INFINITY;
#pragma unroll
    for (int j = 0; j < kN; ++j) here = fmaxf(here, pack.v[j]);
    if (!kGradient && here >= at_target) {
#pragma unroll
      for (int j = 0; j < kN; ++j)
        first = first && (at * kN + j < target ? pack.v[j] < at_target : pack.v[j] <= at_target);
    }
    here = fmaxf(here, largest);
    const float shift = here == -INFINITY ? 0.0f : here * kLog2e;  // nothing but -inf so far: -inf + inf would be nan
    total *= exp2_approx(fmaf(largest, kLog2e, -shift));
#pragma unroll
    for (int j = 0; j < kN; ++j) total += exp2_approx(fmaf(pack.v[j], kLog2e, -shift));
    largest = here;
  };
#pragma unroll 2
  for (int at = thread; at < held; at += kThreads) count(near[at], at);
  for (int at = held + thread; at < chunks; at += kThreads) count(row[at], at);

  const float top = block_max(largest);
  total = block_sum(largest == -INFINITY ? 0.0f : total * exp2_approx((largest - top) * kLog2e));
  const float lse = known ? top + logf(total) : NAN;
  if (thread == 0) losses[blockIdx.x] = lse - at_target;
  if constexpr (!kGradient) {
    const bool hit = __syncthreads_and(first) && !isnan(lse);  // a nan is not found by comparing
    if (hits && thread == 0) hits[blockIdx.x] = hit;
  } else {
    const float shift = lse * kLog2e - log2f(scale);
    const auto turn = [&](Chunk pack, int at) {
#pragma unroll
      for (int j = 0; j < kN; ++j) pack.v[j] = T(exp2_approx(fmaf(pack.v[j], kLog2e, -shift)));
      if (at == target / kN) {
#pragma unroll
        for (int j = 0; j < kN; ++j)
          if (at * kN + j == target) pack.v[j] = T(exp2_approx(fmaf(at_target, kLog2e, -shift)) - scale);
      }
      row[at] = pack;
    };
#pragma unroll 2
    for (int at = thread; at < held; at += kThreads) turn(near[at], at);
    for (int at = held + thread; at < chunks; at += kThreads) turn(row[at], at);
  }
}
template <class T>
void row_losses(Cuda, T* z, const int32_t* targets, float* losses, int32_t* hits, int64_t rows, int64_t v,
                bool gradient, double scale) {
  const bool whole = v % kPack<T> == 0;
  const int64_t bytes = whole ? std::min<int64_t>(v * static_cast<int64_t>(sizeof(T)), kHeldBytes) : 0;
  const auto launch = [&](auto kernel) {
    launch_blocks(kernel, static_cast<unsigned>(rows), kThreads, static_cast<size_t>(bytes), z, targets, losses, hits,
                  v, static_cast<int>(bytes / 16), static_cast<float>(scale));
  };
  if (whole)
    gradient ? launch(row_losses_kernel<T, kPack<T>, true>) : launch(row_losses_kernel<T, kPack<T>, false>);
  else
    gradient ? launch(row_losses_kernel<T, 1, true>) : launch(row_losses_kernel<T, 1, false>);
}

__global__ void totals_kernel(const float* losses, const int32_t* hits, float* loss, int32_t* correct, int64_t rows) {
  float total = 0;
  int count = 0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    total += losses[row];
    if (hits) count += hits[row];
  }
  total = block_sum(total);
  if (threadIdx.x == 0) *loss = total / static_cast<float>(rows);
  if (!hits) return;
  const float all = block_sum(static_cast<float>(count));  // exact below 2^24 rows
  if (threadIdx.x == 0) *correct = static_cast<int>(all);
}
void totals(Cuda, const float* losses, const int32_t* hits, float* loss, int32_t* correct, int64_t rows) {
  launch_blocks(totals_kernel, 1, 1024, 0, losses, hits, loss, correct, rows);
}

template <class X, class Y>
__global__ void scale_by_kernel(const float* s, const X* x, Y* y, int64_t n, bool add) {
  constexpr int kN = kPack<Y>;
  const float factor = *s;
  if (static_cast<const void*>(x) == y && factor == 1.0f) return;
  const int64_t i = element_index() * kN;
  if (i >= n) return;
  const auto in = load_pack<kN>(x + i, n - i);
  Pack<Y, kN> out = load_pack<kN>(y + i, add ? n - i : 0);
#pragma unroll
  for (int j = 0; j < kN; ++j) out.v[j] = Y(float(out.v[j]) + factor * float(in.v[j]));
  store_pack(y + i, out, n - i);
}
template <class X, class Y>
void scale_by(Cuda, const float* s, const X* x, Y* y, int64_t n, bool add) {
  launch_elements(scale_by_kernel<X, Y>, (n + kPack<Y> - 1) / kPack<Y>, s, x, y, n, add);
}
#endif

struct Head {
  Tensor x, weight, targets;
  int64_t rows, width, vocabulary, chunk;
};

Head checked(const char* op, const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t chunk) {
  check(x.rank() >= 1 && weight.rank() == 2 && x.size(-1) == weight.size(1) && x.numel() > 0 && weight.numel() > 0 &&
            x.dtype() == weight.dtype() && x.device() == weight.device() && targets.dtype() == DType::i32 &&
            targets.device() == x.device() && targets.numel() == x.shape().rows() && chunk > 0,
        "{} needs x [.., D], weight [V, D] of its dtype and one i32 target per row on one device, found {} {} on {}, "
        "{} {} on {} and {} {} on {}, by {} rows",
        op, name_of(x.dtype()), x.shape().str(), name_of(x.device()), name_of(weight.dtype()), weight.shape().str(),
        name_of(weight.device()), name_of(targets.dtype()), targets.shape().str(), name_of(targets.device()), chunk);
  const int64_t rows = x.shape().rows(), width = x.size(-1);
  if (x.device() == Device::cpu)
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t target = targets.data<int32_t>()[row];
      check(target >= 0 && target < weight.size(0), "{}: target {} of row {} is outside [0, {})", op, target, row,
            weight.size(0));
    }
  return {x.detached().view({rows, width}), weight.detached(), targets.detached().view({rows}), rows, width,
          weight.size(0), std::min(chunk, rows)};
}

struct Sums {
  Tensor loss, correct, dx, dweight;
};

// hits: count the rows that are right, and make no gradient.
Sums walk(const Head& h, bool hits, bool for_x, bool for_weight) {
  const Device where = h.x.device();
  const DType dtype = h.x.dtype(), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const bool gradient = for_x || for_weight;
  // Two halves lose no more in the weight's dtype than its next sum; many parts would.
  const DType sum_type = h.rows > 2 * h.chunk ? wide : dtype;
  const Tensor losses = Tensor::empty({h.rows}, wide, where);
  const Tensor hit = hits ? Tensor::empty({h.rows}, DType::i32, where) : Tensor{};
  Sums sums{.loss = Tensor::empty({}, wide, where), .correct = hits ? Tensor::empty({}, DType::i32, where) : Tensor{},
            .dx = for_x ? Tensor::like(h.x) : Tensor{},
            .dweight = for_weight ? Tensor::empty(h.weight.shape(), sum_type, where) : Tensor{}};
  const Tensor logits = Tensor::empty({h.chunk, h.vocabulary}, dtype, where);
  on_device(where, [&](auto device) {
    dispatch(device, dtype, [&]<class T>() {
      using A = acc_t<T>;
      for (int64_t from = 0; from < h.rows; from += h.chunk) {
        const int64_t to = std::min(h.rows, from + h.chunk), rows = to - from;
        const T* const x = h.x.data<T>() + from * h.width;
        gemm(device, {.a = x, .b = h.weight.raw(), .c = logits.raw(), .dtype = dtype, .out = dtype, .m = rows,
                      .n = h.vocabulary, .k = h.width, .transpose_b = true});
        row_losses(device, logits.data<T>(), h.targets.data<int32_t>() + from, losses.data<A>() + from,
                   hits ? hit.data<int32_t>() + from : nullptr, rows, h.vocabulary, gradient,
                   1 / static_cast<double>(h.rows));
        if (for_x)
          gemm(device, {.a = logits.raw(), .b = h.weight.raw(), .c = sums.dx.data<T>() + from * h.width, .dtype = dtype,
                        .out = dtype, .m = rows, .n = h.width, .k = h.vocabulary});
        if (for_weight)
          gemm(device, {.a = logits.raw(), .b = x, .c = sums.dweight.raw(), .dtype = dtype,
                        .out = sums.dweight.dtype(), .m = h.vocabulary, .n = h.width, .k = rows, .transpose_a = true,
                        .beta = from == 0 ? 0.0 : 1.0});
      }
      totals(device, losses.data<A>(), hits ? hit.data<int32_t>() : nullptr, sums.loss.data<A>(),
             hits ? sums.correct.data<int32_t>() : nullptr, h.rows);
    });
  });
  return sums;
}

// to = s d, or to += s d; `to` may be d.
void scale_into(const Tensor& to, const Tensor& d, const Tensor& s, bool add) {
  on_device(d.device(), [&](auto device) {
    dispatch(device, d.dtype(), [&]<class X>() {
      dispatch(device, to.dtype(), [&]<class Y>() {
        scale_by(device, s.data<acc_t<X>>(), d.data<X>(), to.data<Y>(), d.numel(), add);
      });
    });
  });
}

}  // namespace

Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t chunk_rows) {
  const Head h = checked("linear_cross_entropy", x, weight, targets, chunk_rows);
  const bool recorded = records({x, weight});
  const Sums sums = walk(h, false, recorded && x.needs_grad(), recorded && weight.needs_grad());
  return record("linear_cross_entropy", sums.loss, {x, weight},
                [dx = sums.dx, dweight = sums.dweight, shape = x.shape(), dtype = x.dtype(),
                 node = weight.node()](const Tensor& dloss) -> Gradients {
                  Gradients gradients(2);
                  if (dx) {
                    scale_into(dx, dx, dloss, false);
                    gradients[0] = dx.view(shape);
                  }
                  if (dweight && node->leaf && node->grad) {
                    scale_into(node->grad, dweight, dloss, true);
                  } else if (dweight) {
                    gradients[1] = dweight.dtype() == dtype ? dweight
                                                            : Tensor::empty(dweight.shape(), dtype, dweight.device());
                    scale_into(gradients[1], dweight, dloss, false);
                  }
                  return gradients;
                });
}

Score linear_score(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t chunk_rows) {
  const Sums sums = walk(checked("linear_score", x, weight, targets, chunk_rows), true, false, false);
  return {sums.loss, sums.correct};
}

}  // namespace weft
