// m = m + (1-b)(g - m); u = g + b (m - g); X = u / (|u| + 1e-7); five times: A = X X^T, X = (aI + bA + cA^2) X;
// w = w - lr sqrt(max(1, rows/cols)) X. Where rows exceed cols, A = X^T X and X = X (aI + bA + cA^2), which is less.
#include "engine/optim/muon.h"

#include <algorithm>
#include <cmath>

#include "engine/allocator.h"
#include "engine/autograd.h"
#include "engine/cpu/gemm.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

constexpr int kSteps = 5;
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr float kNormEps = 1e-7f;
constexpr int64_t kGroupElements = int64_t{1} << 25;  // of the matrices that are orthogonalized together

struct Sizes {
  int64_t matrices, rows, cols;
  int64_t matrix() const { return rows * cols; }
};
Sizes sizes_of(const Tensor& p) {
  return p.rank() == 3 ? Sizes{p.size(0), p.size(1), p.size(2)} : Sizes{1, p.size(0), p.size(1)};
}

WEFT_HD inline float nesterov(float g, float m, float beta) { return g + beta * (m - g); }
template <class T>
WEFT_HD float polynomial(T a, T a2, bool diagonal) {
  return (diagonal ? kA : 0.0f) + kB * a + kC * a2;
}

// x = u / (|u| + eps) of each matrix, after the momentum took in g.
template <class T>
void direction(Cpu, const float* g, float* m, T* x, Sizes s, float scale, float beta) {
  parallel_for(s.matrices, 1, [=](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t from = k * s.matrix(), to = from + s.matrix();
      double sum = 0;
      for (int64_t i = from; i < to; ++i) {
        m[i] += (1 - beta) * (g[i] * scale - m[i]);
        const double u = nesterov(g[i] * scale, m[i], beta);
        sum += u * u;
      }
      const float inverse = 1 / (static_cast<float>(std::sqrt(sum)) + kNormEps);
      for (int64_t i = from; i < to; ++i) x[i] = T(nesterov(g[i] * scale, m[i], beta) * inverse);
    }
  });
}
// a2 = aI + b a + c a2 of each [size, size].
template <class T>
void polynomials(Cpu, const T* a, T* a2, int64_t size, int64_t n) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) a2[i] = T(polynomial(a[i], a2[i], i / size % size == i % size));
  });
}
template <class T>
void descend(Cpu, float* w, const T* x, float rate, int64_t n) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) w[i] -= rate * static_cast<float>(x[i]);
  });
}

#if WEFT_CUDA
constexpr int kThreads = 256;
constexpr int64_t kChunks = 128;  // blocks of one matrix

__device__ float block_sum(float v) {
  __shared__ float sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0;
  for (int i = 0; i < kThreads / 32; ++i) v += sums[i];
  return v;
}

// grid (chunks, matrices): the new momentum, and each chunk's part of |u|^2.
__global__ void muon_momentum(const float* g, float* m, float* partial, int64_t matrix, float scale, float beta) {
  const int64_t base = blockIdx.y * matrix;
  float sum = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < matrix; i += gridDim.x * kThreads) {
    const float grad = g[base + i] * scale;
    const float now = m[base + i] + (1 - beta) * (grad - m[base + i]);
    m[base + i] = now;
    const float u = nesterov(grad, now, beta);
    sum += u * u;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
template <class T>
__global__ void muon_normalize(const float* g, const float* m, const float* partial, T* x, int64_t matrix, float scale,
                               float beta) {
  const int64_t base = blockIdx.y * matrix;
  float sum = 0;
  for (unsigned c = threadIdx.x; c < gridDim.x; c += kThreads) sum += partial[blockIdx.y * gridDim.x + c];
  const float inverse = 1 / (sqrtf(block_sum(sum)) + kNormEps);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < matrix; i += gridDim.x * kThreads)
    x[base + i] = T(nesterov(g[base + i] * scale, m[base + i], beta) * inverse);
}
template <class T>
__global__ void muon_polynomials(const T* a, T* a2, int64_t size, int64_t n) {
  if (const int64_t i = element_index(); i < n) a2[i] = T(polynomial(a[i], a2[i], i / size % size == i % size));
}
template <class T>
__global__ void muon_descend(float* w, const T* x, float rate, int64_t n) {
  if (const int64_t i = element_index(); i < n) w[i] -= rate * static_cast<float>(x[i]);
}

template <class T>
void direction(Cuda, const float* g, float* m, T* x, Sizes s, float scale, float beta) {
  const int64_t chunks = std::min(kChunks, (s.matrix() + kThreads - 1) / kThreads);
  const Tensor partial = Tensor::empty({s.matrices, chunks}, DType::f32, Device::cuda);
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(s.matrices));
  launch_blocks(muon_momentum, grid, kThreads, 0, g, m, partial.data<float>(), s.matrix(), scale, beta);
  launch_blocks(muon_normalize<T>, grid, kThreads, 0, g, m, partial.data<float>(), x, s.matrix(), scale, beta);
}
template <class T>
void polynomials(Cuda, const T* a, T* a2, int64_t size, int64_t n) {
  launch_elements(muon_polynomials<T>, n, a, a2, size, n);
}
template <class T>
void descend(Cuda, float* w, const T* x, float rate, int64_t n) {
  launch_elements(muon_descend<T>, n, w, x, rate, n);
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

Tensor orthogonalized(Tensor x) {
  const bool tall = x.size(1) > x.size(2);
  const int64_t size = std::min(x.size(1), x.size(2));
  for (int step = 0; step < kSteps; ++step) {
    const Tensor a = products(x, x, tall ? Transpose::a : Transpose::b);  // [n, size, size]
    const Tensor p = products(a, a, Transpose::none);
    on_device(x.device(), [&](auto device) {
      dispatch(device, x.dtype(), [&]<class T>() { polynomials(device, a.data<T>(), p.data<T>(), size, p.numel()); });
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

void Muon::step(double learning_rate, double grad_scale) {
  MemoryScope memory(Category::workspace, "muon");
  for (const std::vector<size_t>& group : groups_) {
    const Sizes first = sizes_of(parameters_[group[0]]);
    int64_t matrices = 0;
    for (const size_t i : group) matrices += sizes_of(parameters_[i]).matrices;
    Tensor x = Tensor::empty({matrices, first.rows, first.cols}, options_.compute, parameters_[group[0]].device());

    // Calls f(device, T*, parameter) with the parameter's matrices in x.
    const auto each = [&](auto&& f) {
      int64_t from = 0;
      for (const size_t i : group) {
        const int64_t to = from + sizes_of(parameters_[i]).matrices;
        const Tensor part = x.rows(from, to);
        on_device(x.device(), [&](auto device) {
          dispatch(device, x.dtype(), [&]<class T>() { f(device, part.template data<T>(), i); });
        });
        from = to;
      }
    };
    each([&](auto device, auto* to, size_t i) {
      const Tensor grad = parameters_[i].grad();
      check(static_cast<bool>(grad), "Muon: parameter {} of shape {} has no gradient", i, parameters_[i].shape().str());
      direction(device, grad.data<float>(), momentum_[i].data<float>(), to, sizes_of(parameters_[i]),
                static_cast<float>(grad_scale), static_cast<float>(options_.momentum));
    });
    x = orthogonalized(x);
    const double rate = learning_rate * std::sqrt(std::max(1.0, static_cast<double>(first.rows) / first.cols));
    each([&](auto device, const auto* from, size_t i) {
      descend(device, parameters_[i].data<float>(), from, static_cast<float>(rate), parameters_[i].numel());
    });
  }
  queued("muon");
}

}  // namespace weft
