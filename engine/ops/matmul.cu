// y = op(a) op(b) + bias. With y = a b: da = dy b^T, db = a^T dy; a transposed operand's gradient is transposed too;
// dbias = column sums of dy. matmul_joined's weights are one b, and their gradients one db. The products are BLAS's
// (engine/cpu/gemm.h, engine/cuda/blas.h).
#include "engine/cpu/gemm.h"
#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#include "engine/ops/column_totals.h"
#endif

namespace weft {
namespace {

// Column sums are taken over ranges of rows, then over the ranges in order: the result does not depend on scheduling.
constexpr int64_t kRowRange = 64;

template <class T>
void column_sums(Cpu, const T* x, int64_t rows, int64_t columns, T* y) {
  parallel_for(columns, 64, [=](int64_t from, int64_t to) {
    std::vector<acc_t<T>> total(static_cast<size_t>(to - from));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = from; c < to; ++c)
        total[static_cast<size_t>(c - from)] += static_cast<acc_t<T>>(x[r * columns + c]);
    for (int64_t c = from; c < to; ++c) y[c] = T(total[static_cast<size_t>(c - from)]);
  });
}

#if WEFT_CUDA
constexpr int kRowWarps = 8;

// One block per kRowRange rows and the columns of 32 packs; each warp has its rows' packs on the way at once.
template <class T>
__global__ void __launch_bounds__(kRowWarps * 32) sum_row_range(const T* x, int64_t rows, int64_t columns,
                                                                float* partial) {
  constexpr int kN = kPack<T>, kEach = kRowRange / kRowWarps;
  __shared__ float sums[kRowWarps][32 * kN];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = (blockIdx.x * int64_t{32} + lane) * kN, first = blockIdx.y * kRowRange + warp;
  Pack<T, kN> loaded[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t r = first + k * kRowWarps;
    loaded[k] = load_pack<kN>(x + r * columns + c, r < rows ? columns - c : 0);
  }
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    float total = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) total += float(loaded[k].v[j]);
    sums[warp][j * 32 + lane] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * kN; i += blockDim.x) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) total += sums[w][i];
    const int64_t column = (blockIdx.x * int64_t{32} + i % 32) * kN + i / 32;
    if (column < columns) partial[blockIdx.y * columns + column] = total;
  }
}
template <class T>
void column_sums(Cuda, const T* x, int64_t rows, int64_t columns, T* y) {
  const int64_t ranges = (rows + kRowRange - 1) / kRowRange;
  check(ranges <= 65535, "column sums of {} rows", rows);
  const Tensor partial = Tensor::empty({ranges, columns}, DType::f32, Device::cuda);
  const int64_t each = 32 * kPack<T>;
  const dim3 blocks(static_cast<unsigned>((columns + each - 1) / each), static_cast<unsigned>(ranges));
  launch_blocks(sum_row_range<T>, blocks, kRowWarps * 32, 0, x, rows, columns, partial.data<float>());
  total_columns(partial, y);
}
#endif

// op(a) op(b) as a tensor of shape `shape`.
Tensor product(const Tensor& a, const Tensor& b, const Shape& shape, Gemm g) {
  Tensor y = Tensor::like(a, shape);
  g.a = a.raw();
  g.b = b.raw();
  g.c = y.raw();
  g.dtype = g.out = a.dtype();
  on_device(a.device(), [&](auto device) { gemm(device, g); });
  return y;
}

Tensor column_sums(const Tensor& x, int64_t rows, int64_t columns) {
  Tensor y = Tensor::like(x, {columns});
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { column_sums(device, x.data<T>(), rows, columns, y.data<T>()); });
  });
  return y;
}

// The parts one under the other: where they are if they lie so, else a copy.
Tensor stacked(const std::vector<Tensor>& parts, const Shape& shape) {
  if (const Tensor t = Tensor::joined(parts)) return t.view(shape);
  const Tensor t = Tensor::like(parts[0], shape);
  int64_t from = 0;
  for (const Tensor& p : parts) {
    copy_into(t.rows(from, from + p.size(0)), p.detached());
    from += p.size(0);
  }
  return t;
}

}  // namespace

Tensor matmul(const Tensor& a, const Tensor& b, Transpose transpose, const Tensor& bias) {
  const bool of_a = transpose == Transpose::a, of_b = transpose == Transpose::b;
  check(a.rank() >= (of_a ? 2 : 1) && b.rank() == 2 && (!of_a || a.rank() == 2) && a.dtype() == b.dtype() &&
            a.device() == b.device(),
        "matmul of {} {} and {} {}", name_of(a.dtype()), a.shape().str(), name_of(b.dtype()), b.shape().str());
  const int64_t m = of_a ? a.size(1) : a.shape().rows(), k = of_a ? a.size(0) : a.size(-1);
  const int64_t n = of_b ? b.size(0) : b.size(1), inner = of_b ? b.size(1) : b.size(0);
  check(k == inner && k > 0, "matmul of {}{} and {}{}: the inner sizes must be equal and positive, found {} and {}",
        a.shape().str(), of_a ? " (transposed)" : "", b.shape().str(), of_b ? " (transposed)" : "", k, inner);
  check(!bias || (bias.shape() == Shape{n} && bias.dtype() == a.dtype() && bias.device() == a.device()),
        "matmul's bias must be {} [{}], found {} {}", name_of(a.dtype()), n, name_of(bias.dtype()), bias.shape().str());
  Shape shape = a.shape();
  if (of_a) shape.set(0, m);
  shape.set(-1, n);
  const bool for_a = a.needs_grad(), for_b = b.needs_grad(), for_bias = bias && bias.needs_grad();
  Tensor y = product(a, b, shape,
                     {.m = m, .n = n, .k = k, .transpose_a = of_a, .transpose_b = of_b, .bias = bias.raw()});
  std::vector<Tensor> inputs{a, b};
  if (bias) inputs.push_back(bias);
  return record("matmul", y, inputs,
                [=, has_bias = static_cast<bool>(bias), a_shape = a.shape(), b_shape = b.shape(),
                 a = for_b ? a.detached() : Tensor{},
                 b = for_a ? b.detached() : Tensor{}](const Tensor& dy) -> Gradients {
    Gradients d(has_bias ? 3 : 2);
    if (b && of_a) d[0] = product(b, dy, a_shape, {.m = k, .n = m, .k = n, .transpose_b = true});
    else if (b) d[0] = product(dy, b, a_shape, {.m = m, .n = k, .k = n, .transpose_b = !of_b});
    if (a && of_b) d[1] = product(dy, a, b_shape, {.m = n, .n = k, .k = m, .transpose_a = true});
    else if (a) d[1] = product(a, dy, b_shape, {.m = k, .n = n, .k = m, .transpose_a = !of_a});
    if (for_bias) d[2] = column_sums(dy, m, n);
    return d;
  });
}

Tensor matmul_joined(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  check(!weights.empty() && weights.size() == biases.size() && x.rank() >= 1 && x.size(-1) > 0,
        "matmul_joined of {} with {} weights and {} biases", x.shape().str(), weights.size(), biases.size());
  const int64_t k = x.size(-1), m = x.shape().rows();
  std::vector<Tensor> inputs{x}, shifts;
  std::vector<Shape> weight_shapes, bias_shapes;
  int64_t n = 0;
  bool shifted = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &w = weights[i], &b = biases[i];
    check(w.rank() == 2 && w.size(1) == k && w.dtype() == x.dtype() && w.device() == x.device(),
          "matmul_joined of {} {} and a weight {} {}", name_of(x.dtype()), x.shape().str(), name_of(w.dtype()),
          w.shape().str());
    check(!b || (b.shape() == Shape{w.size(0)} && b.dtype() == x.dtype() && b.device() == x.device()),
          "matmul_joined's bias must be {} [{}], found {} {}", name_of(x.dtype()), w.size(0), name_of(b.dtype()),
          b.shape().str());
    shifted |= static_cast<bool>(b);
    n += w.size(0);
    weight_shapes.push_back(w.shape());
    bias_shapes.push_back({w.size(0)});
  }
  for (size_t i = 0; shifted && i < biases.size(); ++i)
    shifts.push_back(biases[i] ? biases[i] : Tensor::zeros(bias_shapes[i], x.dtype(), x.device()));
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  inputs.insert(inputs.end(), biases.begin(), biases.end());
  const Tensor weight = stacked(weights, {n, k}), bias = shifted ? stacked(shifts, {n}) : Tensor{};
  Shape shape = x.shape();
  shape.set(-1, n);
  const bool for_x = x.needs_grad(), for_weights = records(weights), for_biases = records(biases);
  const Tensor y = product(x, weight, shape, {.m = m, .n = n, .k = k, .transpose_b = true, .bias = bias.raw()});
  return record("matmul_joined", y, inputs,
                [=, x_shape = x.shape(), x = for_weights ? x.detached() : Tensor{},
                 weight = for_x ? weight : Tensor{}](const Tensor& dy) -> Gradients {
                  Gradients d(1);
                  if (weight) d[0] = product(dy, weight, x_shape, {.m = m, .n = k, .k = n});
                  // Each part owns its rows alone, so that a leaf may keep it without a copy.
                  const auto append = [&](std::vector<Tensor> parts) { d.insert(d.end(), parts.begin(), parts.end()); };
                  append(x ? product(dy, x, {n, k}, {.m = n, .n = k, .k = m, .transpose_a = true}).cut(weight_shapes)
                           : Gradients(weight_shapes.size()));
                  append(for_biases ? column_sums(dy, m, n).cut(bias_shapes) : Gradients(bias_shapes.size()));
                  return d;
                });
}

}  // namespace weft
