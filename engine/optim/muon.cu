// m = m + (1-b)(g - m); u = g + b (m - g); X = u / (|u| + 1e-7); five times: A = X X^T, X = (aI + bA + cA^2) X;
// w = w - lr sqrt(max(1, rows/cols)) X. Where rows exceed cols, A = X^T X and X = X (aI + bA + cA^2), which is less.
// The division of u by its norm is left to the first step's polynomial, which saves a pass over u.
#include "engine/optim/muon.h"

#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/cpu/gemm.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#include "engine/optim/master.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#include "engine/cuda/block_sum.h"
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

constexpr int kSteps = 5;
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr float kNormEps = 1e-7f;
// Of the matrices that are orthogonalized together: 16 of 768 x 3072 at once ran at 648 TFLOP/s on an H200, 8 at 594,
// 80 at 613.
constexpr int64_t kGroupElements = 40'000'000;

struct Sizes {
  int64_t matrices, rows, cols;
  int64_t matrix() const { return rows * cols; }
};
Sizes sizes_of(const Tensor& p) {
  return p.rank() == 3 ? Sizes{p.size(0), p.size(1), p.size(2)} : Sizes{1, p.size(0), p.size(1)};
}

// What a step takes of one parameter's gradient and momentum; `x` and `partial` begin at its first matrix.
template <class T>
struct Momentum {
  const void* g;
  bool narrow;  // g is bf16, else f32
  float* m;
  T* x;
  float* partial;  // [matrices, chunks]: sums of squares of u
  float beta;
  const UpdateState* state;
};

// The momentum takes in the gradient; returns the direction u.
WEFT_HD inline float advance(float g, float& m, float scale, float beta) {
  const float grad = g * scale;
  m += (1 - beta) * (grad - m);
  return grad + beta * (m - grad);
}
// An element of f (aI + b f^2 A + c f^4 A^2), from those of A and A^2.
template <class T>
WEFT_HD inline float polynomial(T a, T a2, bool diagonal, float f) {
  const float f2 = f * f;
  return f * ((diagonal ? kA : 0.0f) + kB * (f2 * a) + kC * (f2 * (f2 * a2)));
}

int64_t chunks_of(Cpu, Sizes) { return 1; }
template <class T>
void direction(Cpu, const Momentum<T>& p, Sizes s) {
  if (!p.state->finite) return;
  parallel_for(s.matrices, 1, [=](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      double sum = 0;
      for (int64_t i = k * s.matrix(); i < (k + 1) * s.matrix(); ++i) {
        const float g = p.narrow ? static_cast<const bf16*>(p.g)[i] : static_cast<const float*>(p.g)[i];
        const double u = advance(g, p.m[i], p.state->grad_scale, p.beta);
        p.x[i] = T(static_cast<float>(u));
        sum += u * u;
      }
      p.partial[k] = static_cast<float>(sum);
    }
  });
}
// 1 / (|u| + eps) of each matrix.
void norm_factors(Cpu, const float* partial, int64_t chunks, float* factors, int64_t matrices) {
  for (int64_t k = 0; k < matrices; ++k) {
    double sum = 0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[k * chunks + c];
    factors[k] = 1 / (static_cast<float>(std::sqrt(sum)) + kNormEps);
  }
}
// a2 = f (aI + b f^2 a + c f^4 a2) of each [size, size].
template <class T>
void polynomials(Cpu, const T* a, T* a2, int64_t size, int64_t matrices, const float* factors) {
  parallel_for(matrices * size * size, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      a2[i] = T(polynomial(a[i], a2[i], i / size % size == i % size, factors ? factors[i / (size * size)] : 1.0f));
  });
}
// Elements [i * kN, (i + 1) * kN).
template <bool kSplit, int kN, class T>
WEFT_HD inline void descend(const Master& master, const T* x, float rate, int64_t i) {
  const Elements<T, kN> u = elements<kN>(x, i);
  Elements<float, kN> w = master.read<kSplit, kN>(i);
  for (int j = 0; j < kN; ++j) w.v[j] -= rate * static_cast<float>(u.v[j]);
  master.write<kSplit>(i, w);
}
template <class T>
void descend(Cpu, const Master& w, const T* x, float rate, const UpdateState* state, int64_t n) {
  if (!state->finite) return;
  parallel_for(n, 4096, [=, rate = rate * state->rate_factor](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) w.rest ? descend<true, 1>(w, x, rate, i) : descend<false, 1>(w, x, rate, i);
  });
}

#if WEFT_CUDA
constexpr int kThreads = 256;
constexpr int64_t kChunks = 128;  // blocks of one matrix
constexpr int kWidth = 4;         // elements that a thread takes at once: 16 bytes of f32

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0; }

// grid (chunks, matrices): the new momentum, u, and each chunk's part of |u|^2.
template <int kN, class G, class T>
__global__ void muon_momentum(Momentum<T> p, int64_t matrix) {
  if (!p.state->finite) return;
  const int64_t base = blockIdx.y * matrix / kN;
  const float scale = p.state->grad_scale;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < matrix / kN;
       i += gridDim.x * kThreads) {
    const Elements<G, kN> g = elements<kN>(static_cast<const G*>(p.g), base + i);
    Elements<float, kN> m = elements<kN>(p.m, base + i);
    Elements<T, kN> x;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float u = advance(static_cast<float>(g.v[j]), m.v[j], scale, p.beta);
      x.v[j] = T(u);
      sum += u * u;
    }
    elements<kN>(p.m, base + i) = m;
    elements<kN>(p.x, base + i) = x;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) p.partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
__global__ void muon_norm_factors(const float* partial, int64_t chunks, float* factors) {
  float sum = 0;
  for (int64_t c = threadIdx.x; c < chunks; c += 32) sum += partial[blockIdx.x * chunks + c];
  sum = block_sum<32>(sum);
  if (threadIdx.x == 0) factors[blockIdx.x] = 1 / (sqrtf(sum) + kNormEps);
}
// grid (blocks, matrices)
template <int kN, class T>
__global__ void muon_polynomials(const T* a, T* a2, int size, const float* factors) {
  const int matrix = size * size, at = (blockIdx.x * kThreads + threadIdx.x) * kN;
  if (at >= matrix) return;
  const int row = at / size, column = at % size;
  const int64_t i = (blockIdx.y * static_cast<int64_t>(matrix) + at) / kN;
  const float factor = factors ? factors[blockIdx.y] : 1.0f;
  const Elements<T, kN> from = elements<kN>(a, i);
  Elements<T, kN> to = elements<kN>(a2, i);
#pragma unroll
  for (int j = 0; j < kN; ++j) to.v[j] = T(polynomial(from.v[j], to.v[j], column + j == row, factor));
  elements<kN>(a2, i) = to;
}
template <bool kSplit, int kN, class T>
__global__ void muon_descend(Master w, const T* x, float rate, const UpdateState* state, int64_t n) {
  const int64_t i = element_index();
  if (i < n / kN && state->finite) descend<kSplit, kN>(w, x, rate * state->rate_factor, i);
}

int64_t chunks_of(Cuda, Sizes s) { return std::min(kChunks, (s.matrix() + kThreads - 1) / kThreads); }
template <class T>
void direction(Cuda, const Momentum<T>& p, Sizes s) {
  const dim3 grid(static_cast<unsigned>(chunks_of(Cuda{}, s)), static_cast<unsigned>(s.matrices));
  const auto launch = [&]<class G>(const G*) {
    const bool wide = s.matrix() % kWidth == 0 && aligned(p.g, kWidth * sizeof(G)) && aligned(p.m, 16) &&
                      aligned(p.x, kWidth * sizeof(T));
    if (wide) launch_blocks(muon_momentum<kWidth, G, T>, grid, kThreads, 0, p, s.matrix());
    else launch_blocks(muon_momentum<1, G, T>, grid, kThreads, 0, p, s.matrix());
  };
  if (p.narrow) launch(static_cast<const bf16*>(nullptr));
  else launch(static_cast<const float*>(nullptr));
}
void norm_factors(Cuda, const float* partial, int64_t chunks, float* factors, int64_t matrices) {
  launch_blocks(muon_norm_factors, dim3(static_cast<unsigned>(matrices)), 32, 0, partial, chunks, factors);
}
template <class T>
void polynomials(Cuda, const T* a, T* a2, int64_t size, int64_t matrices, const float* factors) {
  constexpr int kN = 16 / sizeof(T);
  check(size <= 32768, "Muon takes matrices whose smaller side is at most 32768, found {}", size);
  const auto grid = [&](int64_t width) {
    const int64_t of_block = kThreads * width;
    return dim3(static_cast<unsigned>((size * size + of_block - 1) / of_block), static_cast<unsigned>(matrices));
  };
  if (size % kN == 0) launch_blocks(muon_polynomials<kN, T>, grid(kN), kThreads, 0, a, a2, static_cast<int>(size), factors);
  else launch_blocks(muon_polynomials<1, T>, grid(1), kThreads, 0, a, a2, static_cast<int>(size), factors);
}
template <class T>
void descend(Cuda, const Master& w, const T* x, float rate, const UpdateState* state, int64_t n) {
  const bool wide = n % kWidth == 0 && w.aligned<kWidth>() && aligned(x, kWidth * sizeof(T));
  const auto launch = [&](auto whole, auto split, int64_t steps) {
    launch_elements(w.rest ? split : whole, steps, w, x, rate, state, n);
  };
  if (wide) launch(muon_descend<false, kWidth, T>, muon_descend<true, kWidth, T>, n / kWidth);
  else launch(muon_descend<false, 1, T>, muon_descend<true, 1, T>, n);
}
#endif

// Each matrix of a [n, .., ..] times its fellow of b.
Tensor products(const Tensor& a, const Tensor& b, Transpose transpose) {
  const bool transpose_a = transpose == Transpose::a, transpose_b = transpose == Transpose::b;
  const int64_t m = a.size(transpose_a ? 2 : 1), k = a.size(transpose_a ? 1 : 2), n = b.size(transpose_b ? 1 : 2);
  const Tensor y = Tensor::like(a, {a.size(0), m, n});
  on_device(a.device(), [&](auto device) {
    gemm(device, {.a = a.raw(), .b = b.raw(), .c = y.raw(), .dtype = a.dtype(), .m = m, .n = n, .k = k,
                  .transpose_a = transpose_a, .transpose_b = transpose_b, .batch = a.size(0), .stride_a = m * k,
                  .stride_b = k * n, .stride_c = m * n});
  });
  return y;
}

}  // namespace

Tensor orthogonalized(Tensor x, const Tensor& factors) {
  const bool tall = x.size(1) > x.size(2);
  const int64_t size = std::min(x.size(1), x.size(2));
  for (int step = 0; step < kSteps; ++step) {
    const Tensor a = products(x, x, tall ? Transpose::a : Transpose::b);  // [n, size, size]
    const Tensor p = products(a, a, Transpose::none);
    on_device(x.device(), [&](auto device) {
      dispatch(device, x.dtype(), [&]<class T>() {
        polynomials(device, a.data<T>(), p.data<T>(), size, p.size(0), step == 0 ? factors.data<float>() : nullptr);
      });
    });
    x = tall ? products(x, p, Transpose::none) : products(p, x, Transpose::none);
  }
  return x;
}

Muon::Muon(std::vector<Tensor> parameters, MuonOptions options)
    : parameters_(std::move(parameters)), options_(options) {
  MemoryScope memory(Category::optimizer, "muon");
  for (const Tensor& p : parameters_) {
    check(p.rank() == 2 || p.rank() == 3, "Muon takes matrices, found shape {}", p.shape().str());
    momentum_.push_back(Tensor::zeros(p.shape(), DType::f32, p.device()));
  }
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Sizes s = sizes_of(parameters_[i]);
    const auto fits = [&](const std::vector<size_t>& group) {
      const Sizes first = sizes_of(parameters_[group[0]]);
      int64_t elements = parameters_[i].numel();
      for (const size_t j : group) elements += parameters_[j].numel();
      return first.rows == s.rows && first.cols == s.cols && elements <= kGroupElements;
    };
    const auto group = std::find_if(groups_.begin(), groups_.end(), fits);
    if (group == groups_.end())
      groups_.push_back({i});
    else
      group->push_back(i);
  }
}

void Muon::step(double learning_rate, const UpdateState* state) {
  MemoryScope memory(Category::workspace, "muon");
  for (const std::vector<size_t>& group : groups_) {
    const Sizes first = sizes_of(parameters_[group[0]]);
    int64_t matrices = 0;
    for (const size_t i : group) matrices += sizes_of(parameters_[i]).matrices;
    const Device device = parameters_[group[0]].device();
    Tensor x = Tensor::empty({matrices, first.rows, first.cols}, options_.compute, device);
    const int64_t chunks = on_device(device, [&](auto d) { return chunks_of(d, first); });
    const Tensor partial = Tensor::empty({matrices, chunks}, DType::f32, device);
    const Tensor factors = Tensor::empty({matrices}, DType::f32, device);

    // Calls f(device, T*, parameter, its first matrix) with the parameter's matrices in x.
    const auto each = [&](auto&& f) {
      int64_t from = 0;
      for (const size_t i : group) {
        const int64_t to = from + sizes_of(parameters_[i]).matrices;
        const Tensor part = x.rows(from, to);
        on_device(device, [&](auto d) {
          dispatch(d, x.dtype(), [&]<class T>() { f(d, part.template data<T>(), i, from); });
        });
        from = to;
      }
    };
    each([&]<class T>(auto d, T* to, size_t i, int64_t from) {
      const Tensor grad = parameters_[i].grad();
      check(static_cast<bool>(grad), "Muon: parameter {} of shape {} has no gradient", i, parameters_[i].shape().str());
      const bool narrow = grad.dtype() == DType::bf16;
      check(narrow || grad.dtype() == DType::f32, "Muon takes gradients in f32 or bf16, found {}",
            name_of(grad.dtype()));
      direction(d, Momentum<T>{grad.raw(), narrow, momentum_[i].data<float>(), to,
                               partial.data<float>() + from * chunks, static_cast<float>(options_.momentum), state},
                sizes_of(parameters_[i]));
    });
    on_device(device, [&](auto d) {
      norm_factors(d, partial.data<float>(), chunks, factors.data<float>(), matrices);
    });
    x = orthogonalized(x, factors);
    const double rate = learning_rate * std::sqrt(std::max(1.0, static_cast<double>(first.rows) / first.cols));
    each([&]<class T>(auto d, T* from, size_t i, int64_t) {
      descend(d, master_of(parameters_[i]), static_cast<const T*>(from), static_cast<float>(rate), state,
              parameters_[i].numel());
    });
  }
  queued("muon");
}

void Muon::step(double learning_rate, double grad_scale) {
  if (!parameters_.empty()) step(learning_rate, state_in(known_state(parameters_[0].device(), grad_scale)));
}

}  // namespace weft
