// Causal attention. With q and k as rope.cu has rotated them, p[t, s] = softmax over s <= t of scale q_t.k_s, and m the
// dropout mask over 1-p_drop:
//   y_t = sum_s m[t, s] p[t, s] v_s
//   dp[t, s] = m[t, s] dy_t.v_s,  delta_t = sum_s p[t, s] dp[t, s] = dy_t.y_t,  ds = scale p (dp - delta)
//   dv_s = sum_t m p dy_t,  dk_s = sum_t ds[t, s] q_t,  dq_t = sum_s ds[t, s] k_s
// Saved: q and k, rotated, v, y, each row's log sum exp, from which p is computed again, and m as one bit an element.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/allocator.h"
#include "engine/cpu/exp.h"
#include "engine/cpu/parallel.h"
#include "engine/cpu/random_bits.h"
#include "engine/cpu/widest.h"
#include "engine/ops.h"
#include "engine/ops/attention_kernels.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

// ---- CPU: one (sequence, head) at a time, as dense rows of the accumulation type. Loops run along keys or columns,
// four queries at a time, so that the compiler can use vector instructions.
constexpr int kQueries = 4;

template <class A>
using Rows = std::vector<A>;

// [T, width] of one head, read from rows `stride` apart.
template <class A, class T>
Rows<A> read_rows(const T* from, int64_t stride, int64_t time, int64_t width) {
  Rows<A> rows(static_cast<size_t>(time * width));
  for (int64_t t = 0; t < time; ++t)
    for (int64_t d = 0; d < width; ++d) rows[t * width + d] = from[t * stride + d];
  return rows;
}
// The same as [width, T].
template <class A, class T>
Rows<A> read_columns(const T* from, int64_t stride, int64_t time, int64_t width) {
  Rows<A> columns(static_cast<size_t>(time * width));
  for (int64_t t = 0; t < time; ++t)
    for (int64_t d = 0; d < width; ++d) columns[d * time + t] = from[t * stride + d];
  return columns;
}
template <class A, class T>
void write_rows(const Rows<A>& rows, T* to, int64_t stride, int64_t time, int64_t width) {
  for (int64_t t = 0; t < time; ++t)
    for (int64_t d = 0; d < width; ++d) to[t * stride + d] = T(rows[t * width + d]);
}

// out[0, n) += sum over j < count <= 4 of weights[j * weight_stride] * rows[j * row_stride + (0, n)]
template <class A>
WEFT_WIDEST void add_rows(A* __restrict out, const A* weights, int64_t weight_stride, const A* rows, int64_t row_stride,
              int64_t count, int64_t n) {
  if (count == 4) {  // one pass over `out` for all four
    const A w0 = weights[0], w1 = weights[weight_stride];
    const A w2 = weights[2 * weight_stride], w3 = weights[3 * weight_stride];
    const A *r0 = rows, *r1 = rows + row_stride, *r2 = rows + 2 * row_stride, *r3 = rows + 3 * row_stride;
    for (int64_t i = 0; i < n; ++i) out[i] += (w0 * r0[i] + w1 * r1[i]) + (w2 * r2[i] + w3 * r3[i]);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const A w = weights[j * weight_stride], *row = rows + j * row_stride;
    for (int64_t i = 0; i < n; ++i) out[i] += w * row[i];
  }
}

// products[r, s] = row r . column s for s < keys; rows [count, width], columns [width, T].
template <class A>
void row_products(A* products, const A* rows, const A* columns, int64_t count, int64_t keys, int64_t time,
                  int64_t width) {
  for (int64_t r = 0; r < count; ++r) std::fill_n(products + r * time, keys, A(0));
  for (int64_t d = 0; d < width; d += 4)
    for (int64_t r = 0; r < count; ++r)
      add_rows(products + r * time, rows + r * width + d, 1, columns + d * time, time, std::min<int64_t>(4, width - d),
               keys);
}

// sums[r, :] += sum_s weights[r, s] rows[s, :]
template <class A>
void add_weighted(A* sums, const A* weights, const A* rows, int64_t count, int64_t keys, int64_t time, int64_t width) {
  for (int64_t s = 0; s < keys; s += 4)
    for (int64_t r = 0; r < count; ++r)
      add_rows(sums + r * width, weights + r * time + s, 1, rows + s * width, width, std::min<int64_t>(4, keys - s),
               width);
}

// sums[s, :] += sum_r weights[r, s] rows[r, :]
template <class A>
void add_spread(A* sums, const A* weights, const A* rows, int64_t count, int64_t keys, int64_t time, int64_t width) {
  for (int64_t s = 0; s < keys; ++s) add_rows(sums + s * width, weights + s, time, rows, width, count, width);
}

// Draws the words of the mask that row `row` of [B, H, T] reads.
WEFT_WIDEST void draw_row(uint32_t* kept, std::vector<uint16_t>& halves, const AttentionSize& a, const Mask& mask,
                          int64_t row) {
  const int64_t words = row % a.time / 32 + 1;
  halves.resize(static_cast<size_t>(32 * words));
  draw_halves(mask.key, static_cast<uint64_t>(row * a.kept_words * 32), 32 * words, halves.data());
  for (int64_t i = 0; i < words; ++i) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < 32; ++j)
      bits |= static_cast<uint32_t>(halves[static_cast<size_t>(32 * i + j)] < mask.threshold) << j;
    kept[row * a.kept_words + i] = bits;
  }
}
// factors[s] = 1/(1-p) where the mask keeps the row's element s, else 0.
template <class A>
WEFT_WIDEST void read_factors(A* factors, const AttentionSize& a, int64_t row, int64_t keys) {
  const uint32_t* words = a.kept + row * a.kept_words;
  for (int64_t s = 0; s < keys; ++s) factors[s] = words[s / 32] >> s % 32 & 1u ? static_cast<A>(a.keep_scale) : A(0);
}

// row[s] = exp(row[s] - top) for s < n; returns their sum.
template <class A>
WEFT_WIDEST A exponentials(A* row, A top, int64_t n) {
  for (int64_t s = 0; s < n; ++s) row[s] = loop_exp(row[s] - top);
  constexpr int kSums = 16;  // side by side
  A sums[kSums] = {}, total = 0;
  int64_t s = 0;
  for (; s + kSums <= n; s += kSums)
    for (int j = 0; j < kSums; ++j) sums[j] += row[s + j];
  for (const A sum : sums) total += sum;
  for (; s < n; ++s) total += row[s];
  return total;
}

// p[s] = the probability times its factor, ds[s] the gradient of the score, for s < n; before, p has the scores and ds
// the gradients of the probabilities.
template <class A>
WEFT_WIDEST void score_gradients(A* p, A* ds, const A* factors, A scale, A lse, A delta, int64_t n) {
#pragma GCC ivdep
  for (int64_t s = 0; s < n; ++s) {
    const A prob = loop_exp(p[s] * scale - lse);
    ds[s] = scale * prob * (ds[s] * factors[s] - delta);
    p[s] = prob * factors[s];
  }
}

template <class T>
void forward(Cpu, const AttentionSize& a, Mask mask, uint32_t* kept, const AttentionForward<T>& x) {
  using A = acc_t<T>;
  mask.key = mask.key.at_step();
  const int64_t time = a.time, dk = a.key_width, dv = a.value_width;
  parallel_for(int64_t{a.batch} * a.heads, 1, [=, &a, &x](int64_t from, int64_t to) {
    Rows<A> p(static_cast<size_t>(kQueries * time)), factors(static_cast<size_t>(time));
    std::vector<uint16_t> halves;
    for (int64_t i = from; i < to; ++i) {
      const Place at(a, i);
      const Rows<A> queries = read_rows<A>(x.q + at.q, at.q_stride, time, dk);
      const Rows<A> keys = read_columns<A>(x.k + at.k, at.k_stride, time, dk);
      const Rows<A> values = read_rows<A>(x.v + at.v, at.v_stride, time, dv);
      Rows<A> out(static_cast<size_t>(time * dv));
      for (int64_t t0 = 0; t0 < time; t0 += kQueries) {
        const int64_t count = std::min<int64_t>(kQueries, time - t0), last = t0 + count;
        row_products(p.data(), queries.data() + t0 * dk, keys.data(), count, last, time, dk);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t t = t0 + r;
          A* row = p.data() + r * time;
          A top = row[0] * A(a.scale);
          for (int64_t s = 0; s <= t; ++s) top = std::max(top, row[s] *= A(a.scale));
          const A total = exponentials(row, top, t + 1);
          for (int64_t s = 0; s <= t; ++s) row[s] /= total;
          std::fill(row + t + 1, row + last, A(0));
          x.lse[at.rows + t] = top + std::log(total);
          if (kept) {
            draw_row(kept, halves, a, mask, at.rows + t);
            read_factors(factors.data(), a, at.rows + t, t + 1);
            for (int64_t s = 0; s <= t; ++s) row[s] *= factors[static_cast<size_t>(s)];
          }
        }
        add_weighted(out.data() + t0 * dv, p.data(), values.data(), count, last, time, dv);
      }
      write_rows(out, x.out + at.y, at.y_stride, time, dv);
    }
  });
}

// Whether it has done all of it: dk's sum over heads and the turning back too.
template <class T>
bool whole_backward(Cpu, const AttentionSize&, const AttentionBackward<T>&) {
  return false;
}
template <class T>
void backward(Cpu, const AttentionSize& a, const AttentionBackward<T>& x) {
  using A = acc_t<T>;
  const int64_t time = a.time, dk = a.key_width, dv = a.value_width;
  parallel_for(int64_t{a.batch} * a.heads, 1, [=, &a, &x](int64_t from, int64_t to) {
    Rows<A> p(static_cast<size_t>(kQueries * time)), ds = p, factors(static_cast<size_t>(time), A(1));
    for (int64_t i = from; i < to; ++i) {
      const Place at(a, i);
      const Rows<A> queries = read_rows<A>(x.q + at.q, at.q_stride, time, dk);
      const Rows<A> keys = read_rows<A>(x.k + at.k, at.k_stride, time, dk);
      const Rows<A> key_columns = read_columns<A>(x.k + at.k, at.k_stride, time, dk);
      const Rows<A> value_columns = read_columns<A>(x.v + at.v, at.v_stride, time, dv);
      const Rows<A> outputs = read_rows<A>(x.y + at.y, at.y_stride, time, dv);
      const Rows<A> dys = read_rows<A>(x.dy + at.y, at.y_stride, time, dv);
      Rows<A> dqs(static_cast<size_t>(time * dk)), dks(static_cast<size_t>(time * dk));
      Rows<A> dvs(static_cast<size_t>(time * dv));
      for (int64_t t0 = 0; t0 < time; t0 += kQueries) {
        const int64_t count = std::min<int64_t>(kQueries, time - t0), last = t0 + count;
        row_products(p.data(), queries.data() + t0 * dk, key_columns.data(), count, last, time, dk);
        row_products(ds.data(), dys.data() + t0 * dv, value_columns.data(), count, last, time, dv);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t t = t0 + r;
          A *p_row = p.data() + r * time, *ds_row = ds.data() + r * time, delta = 0;
          for (int64_t d = 0; d < dv; ++d) delta += dys[t * dv + d] * outputs[t * dv + d];
          if (a.kept) read_factors(factors.data(), a, at.rows + t, t + 1);
          score_gradients(p_row, ds_row, factors.data(), A(a.scale), x.lse[at.rows + t], delta, t + 1);
          std::fill(p_row + t + 1, p_row + last, A(0));
          std::fill(ds_row + t + 1, ds_row + last, A(0));
        }
        add_weighted(dqs.data() + t0 * dk, ds.data(), keys.data(), count, last, time, dk);
        add_spread(dks.data(), ds.data(), queries.data() + t0 * dk, count, last, time, dk);
        add_spread(dvs.data(), p.data(), dys.data() + t0 * dv, count, last, time, dv);
      }
      write_rows(dqs, x.dq + at.q, at.q_stride, time, dk);
      write_rows(dvs, x.dv + at.v, at.v_stride, time, dv);
      if (x.dk_heads)
        write_rows(dks, x.dk_heads + at.dk, at.dk_stride, time, dk);
      else
        write_rows(dks, x.dk + at.k, at.k_stride, time, dk);
    }
  });
}

// The gradient of a shared key head, one element of [B, T, 1, Dk]: the sum over the heads of [B, T, H, Dk].
template <class T>
WEFT_HD T sum_of_heads(const acc_t<T>* dk_heads, int64_t i, int heads, int width) {
  acc_t<T> sum = 0;
  for (int h = 0; h < heads; ++h) sum += dk_heads[(i / width * heads + h) * width + i % width];
  return T(sum);
}
template <class T>
void sum_heads(Cpu, const acc_t<T>* dk_heads, T* dk, int64_t n, int heads, int width) {
  parallel_for(n, 4096, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) dk[i] = sum_of_heads<T>(dk_heads, i, heads, width);
  });
}

#if WEFT_CUDA
__global__ void attention_draw(AttentionSize a, Mask mask, uint32_t* kept, int64_t words) {
  const int64_t i = element_index();
  mask.key = mask.key.at_step();
  if (i < words && i % a.kept_words * 32 <= i / a.kept_words % a.time) kept[i] = kept_word(mask, i);
}
template <class T>
void forward(Cuda, const AttentionSize& a, const Mask& mask, uint32_t* kept, const AttentionForward<T>& tensors) {
  if constexpr (std::is_same_v<T, bf16>)
    if (attention_forward_warpgroup(a, mask, kept, tensors)) return;
  if (kept) {
    const int64_t words = int64_t{a.batch} * a.heads * a.time * a.kept_words;
    launch_elements(attention_draw, words, a, mask, kept, words);
  }
  if constexpr (std::is_same_v<T, bf16>)
    if (attention_forward_mma(a, tensors)) return;
  attention_forward_simt(a, tensors);
}

// delta[b, h, t] = dy_t . y_t: 8 lanes for each row of [B, T, H].
template <class T>
__global__ void attention_delta(const T* y, const T* dy, float* delta, int64_t rows, int time, int heads, int width) {
  const int64_t row = element_index() / 8;
  float sum = 0;
  for (int d = threadIdx.x % 8 * 8; row < rows && d < width; d += 64) {
    const auto ys = load_pack<8>(y + row * width + d, width - d), dys = load_pack<8>(dy + row * width + d, width - d);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += float(ys.v[j]) * float(dys.v[j]);
  }
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const int64_t h = row % heads, t = row / heads % time, b = row / heads / time;
  if (threadIdx.x % 8 == 0 && row < rows) delta[(b * heads + h) * time + t] = sum;
}
template <class T>
__global__ void attention_sum_heads(const float* dk_heads, T* dk, int64_t n, int heads, int width) {
  if (const int64_t i = element_index(); i < n) dk[i] = sum_of_heads<T>(dk_heads, i, heads, width);
}

template <class T>
bool whole_backward(Cuda, const AttentionSize& a, const AttentionBackward<T>& tensors) {
  if constexpr (std::is_same_v<T, bf16>) return attention_backward_warpgroup(a, tensors);
  return false;
}
template <class T>
void backward(Cuda, const AttentionSize& a, const AttentionBackward<T>& tensors) {
  const int64_t rows = int64_t{a.batch} * a.time * a.heads;
  launch_elements(attention_delta<T>, rows * 8, tensors.y, tensors.dy, tensors.delta, rows, a.time, a.heads,
                  a.value_width);
  if constexpr (std::is_same_v<T, bf16>)
    if (attention_backward_mma(a, tensors)) return;
  attention_backward_simt(a, tensors);
}
template <class T>
void sum_heads(Cuda, const float* dk_heads, T* dk, int64_t n, int heads, int width) {
  launch_elements(attention_sum_heads<T>, n, dk_heads, dk, n, heads, width);
}
#endif

struct Sizes {  // of q, k and v
  int64_t heads, key_heads, key_width, value_width, q_stride, k_stride, v_stride;
};

Sizes sizes_of(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.rank() == 4 && k.rank() == 4 && v.rank() == 4, "attention takes q, k and v of rank 4, found {}, {} and {}",
        q.shape().str(), k.shape().str(), v.shape().str());
  check(k.size(0) == q.size(0) && k.size(1) == q.size(1) && (k.size(2) == q.size(2) || k.size(2) == 1) &&
            k.size(3) == q.size(3) && q.size(3) > 0,
        "q [B, T, H, Dk] needs k [B, T, H or 1, Dk], found {} and {}", q.shape().str(), k.shape().str());
  check(v.size(0) == q.size(0) && v.size(1) == q.size(1) && v.size(2) == q.size(2) && v.size(3) > 0,
        "q [B, T, H, Dk] needs v [B, T, H, Dv], found {} and {}", q.shape().str(), v.shape().str());
  check(q.dtype() == k.dtype() && q.dtype() == v.dtype(), "q, k and v need one dtype, found {}, {} and {}",
        name_of(q.dtype()), name_of(k.dtype()), name_of(v.dtype()));
  check(q.device() == k.device() && q.device() == v.device(), "q, k and v need one device, found {}, {} and {}",
        name_of(q.device()), name_of(k.device()), name_of(v.device()));
  return {q.size(2), k.size(2), q.size(3), v.size(3), q.size(2) * q.size(3), k.size(2) * k.size(3),
          v.size(2) * v.size(3)};
}

AttentionSize size_of_attention(const Tensor& x, const Sizes& z, const AttentionOptions& o) {
  check(o.dropout >= 0 && o.dropout < 1, "dropout must be in [0, 1), found {}", o.dropout);
  check(x.size(0) * x.size(1) * z.heads <= INT32_MAX, "too many rows for attention: {}", x.shape().str());
  const Tensor& angles = o.angles;
  check(!angles || (angles.rank() == 2 && angles.dtype() == DType::f32 && angles.device() == x.device() &&
                    angles.size(0) >= x.size(1) && angles.size(1) % 2 == 0 && angles.size(1) <= z.key_width),
        "attention of {} on {} needs angles f32 [>=T, R even, at most {}] there, found {} {} on {}", x.shape().str(),
        name_of(x.device()), z.key_width, name_of(angles.dtype()), angles.shape().str(), name_of(angles.device()));
  AttentionSize a;
  a.batch = static_cast<int>(x.size(0));
  a.time = static_cast<int>(x.size(1));
  a.heads = static_cast<int>(z.heads);
  a.key_heads = static_cast<int>(z.key_heads);
  a.key_width = static_cast<int>(z.key_width);
  a.value_width = static_cast<int>(z.value_width);
  a.scale = o.scale;
  a.keep_scale = Mask(o.key, o.dropout).scale();
  a.kept = nullptr;
  a.kept_words = (x.size(1) + 63) / 64 * 2;
  a.q_stride = z.q_stride, a.k_stride = z.k_stride, a.v_stride = z.v_stride;
  a.angles = angles.data<float>();
  a.rotated = angles ? static_cast<int>(angles.size(1)) : 0;
  return a;
}

// Where q, k and v or their gradients lie: three tensors, or one that has them side by side.
template <class T>
struct Operands {
  T *q, *k, *v;
  Operands(const std::vector<Tensor>& xs, const AttentionSize& a)
      : q(xs[0].data<T>()), k(xs.size() == 3 ? xs[1].data<T>() : q + a.heads * a.key_width),
        v(xs.size() == 3 ? xs[2].data<T>() : k + a.heads * a.key_width) {}
};

Tensor attend(std::vector<Tensor> xs, const Sizes& sizes, const AttentionOptions& options) {
  AttentionSize a = size_of_attention(xs[0], sizes, options);
  const DType sums = xs[0].dtype() == DType::f64 ? DType::f64 : DType::f32;
  const Device where = xs[0].device();
  for (size_t i = 0; a.rotated > 0 && i < xs.size() && i < 2; ++i)
    if (!xs[i].sole_owner()) {
      const Tensor x = xs[i];
      xs[i] = Tensor::like(x);
      copy_into(xs[i], x);
      xs[i].set_node(x.node());
    }
  Tensor y = Tensor::like(xs[0], {a.batch, a.time, a.heads, a.value_width});
  Tensor lse = Tensor::empty({a.batch, a.heads, a.time}, sums, where);
  Tensor bits;
  if (options.dropout > 0)
    bits = Tensor::empty({int64_t{a.batch} * a.heads * a.time, a.kept_words}, DType::i32, where);
  uint32_t* kept = reinterpret_cast<uint32_t*>(bits.data<int32_t>());
  a.kept = kept;
  const Mask mask(options.key, options.dropout);
  on_device(where, [&](auto device) {
    dispatch(device, y.dtype(), [&]<class T>() {
      const Operands<T> in(xs, a);
      rotate(where, dtype_of<T>, a, in.q, in.k, Turn::forward);
      forward<T>(device, a, mask, kept, {in.q, in.k, in.v, y.data<T>(), lse.data<acc_t<T>>()});
    });
  });
  std::vector<Tensor> saved;
  for (const Tensor& x : xs) saved.push_back(x.detached());
  // The closure keeps `bits` and `angles` because `a` points into them.
  return record("attention", y, xs, [a, saved, y, lse, bits, angles = options.angles](const Tensor& dy) -> Gradients {
    Gradients dxs;
    for (const Tensor& x : saved) dxs.push_back(Tensor::like(x));
    MemoryScope scope(Category::workspace);
    on_device(y.device(), [&](auto device) {
      dispatch(device, y.dtype(), [&]<class T>() {
        const Operands<T> in(saved, a), out(dxs, a);
        AttentionBackward<T> x{.q = in.q, .k = in.k, .v = in.v, .y = y.data<T>(), .dy = dy.data<T>(),
                               .lse = lse.data<acc_t<T>>(), .dq = out.q, .dk = out.k, .dv = out.v};
        if (whole_backward<T>(device, a, x)) return;
        Tensor delta, dk_heads;
        if (y.device() == Device::cuda) delta = Tensor::like(lse);
        if (a.key_heads != a.heads)
          dk_heads = Tensor::empty({a.batch, a.time, a.heads, a.key_width}, lse.dtype(), y.device());
        x.delta = delta.data<acc_t<T>>(), x.dk_heads = dk_heads.data<acc_t<T>>();
        backward<T>(device, a, x);
        if (x.dk_heads) sum_heads<T>(device, x.dk_heads, x.dk, dxs[1].numel(), a.heads, a.key_width);
        rotate(y.device(), dtype_of<T>, a, x.dq, x.dk, Turn::back);
      });
    });
    return dxs;
  });
}

}  // namespace

Tensor attention(Tensor q, Tensor k, Tensor v, const AttentionOptions& options) {
  const Sizes sizes = sizes_of(q, k, v);
  std::vector<Tensor> xs(3);
  xs[0] = std::move(q), xs[1] = std::move(k), xs[2] = std::move(v);
  return attend(std::move(xs), sizes, options);
}

Tensor attention(Tensor qkv, const AttentionOptions& options) {
  check(qkv.rank() == 4 && qkv.size(2) % 3 == 0 && qkv.numel() > 0,
        "attention takes q, k and v side by side as [B, T, 3 * H, D], found {}", qkv.shape().str());
  const int64_t heads = qkv.size(2) / 3, width = qkv.size(3), stride = 3 * heads * width;
  std::vector<Tensor> xs(1);
  xs[0] = std::move(qkv);
  return attend(std::move(xs), {heads, heads, width, width, stride, stride, stride}, options);
}

}  // namespace weft
