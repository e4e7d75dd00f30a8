// Every op of the engine: one declaration and its contract. Each is defined in engine/ops/<op>.cu, with its formula,
// CPU loops, kernels and gradient. Letters: B batch, T time, D width, H heads, E experts, K chosen, V vocabulary,
// N tokens (B*T). Floating inputs of one op share a dtype and a device unless a line says otherwise; sums are kept in
// f32 (f64 for f64). Misuse throws Fault::internal with the shapes found.
#pragma once
#include <optional>

#include "engine/autograd.h"
#include "engine/random.h"
#include "engine/tensor.h"

namespace weft {

// ---- element by element
Tensor add(const Tensor& a, const Tensor& b);  // a + b, same shape
Tensor mul(const Tensor& a, const Tensor& b);  // a * b, same shape
Tensor scale(const Tensor& x, double s);       // s * x
Tensor silu(const Tensor& x);                  // x / (1 + exp(-x))
Tensor cast(const Tensor& x, DType dtype);     // x in another floating dtype; x itself when it is that already
// x / (1-p) where Mask(key, p) of engine/random.h keeps an element, else 0; p is rounded to 2^-16. The mask is drawn
// again in the gradient. p = 0 gives x itself.
Tensor dropout(const Tensor& x, double p, RngKey key);

// ---- shape
Tensor reshape(const Tensor& x, const Shape& shape);                    // shares data
// [a, b] along the last axis: a [.., H, Da], b [.., H or 1, Db] -> [.., H, Da+Db]; a single head of b serves all of a's.
Tensor concat_last(const Tensor& a, const Tensor& b);
// The columns of x [.., W] cut into at most 4 parts [.., width], each as it is or as rms_norm gives it, in one pass
// each way: all parts share one gradient of x.
struct SplitPart {
  int64_t width;
  Tensor norm = {};  // weight [width] of a norm, in f32 (f64 for f64); no tensor: none
  double eps = 0;    // its
};
std::vector<Tensor> split_last(const Tensor& x, const std::vector<SplitPart>& parts);

// ---- reductions to one f32 (f64 for f64) element of shape []
Tensor sum(const Tensor& x);
Tensor mean(const Tensor& x);

// ---- products
enum class Transpose : uint8_t { none, a, b };
// a [.., M, K] b [K, N] -> [.., M, N] (all of a's leading axes are rows); Transpose::b takes b as [N, K] (a Linear
// weight), Transpose::a takes a as [K, M] (rank 2). bias [N] is optional.
Tensor matmul(const Tensor& a, const Tensor& b, Transpose transpose = Transpose::none, const Tensor& bias = {});
// x times each weight [N_i, K] transposed, plus its bias [N_i] where there is one, side by side: [.., sum N_i], as one
// product. Weights (and biases) that do not lie one after another in memory are copied so first (Scope::join).
Tensor matmul_joined(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases);

// ---- layers
// x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang & Sennrich, 2019). weight [D], f32 or x's dtype.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
// The residual stream and its norm, in one pass each way: sum = residual + dropout(x, p, key) (without a residual
// dropout(x, p, key)), normed = rms_norm(sum, weight, eps).
struct NormedSum {
  Tensor sum, normed;
};
NormedSum add_rms_norm(const Tensor& residual, const Tensor& x, const Tensor& weight, double eps, double p = 0,
                       RngKey key = {});
// scale * table[ids]: ids i32 of any shape, table [V, D] -> [.., D] in `dtype`. The gradient is summed in a fixed
// order, so it is deterministic; it has the table's dtype, or is added to what a leaf has already. An id outside the
// table reads as zeros and is reported by the loader's check, not here.
Tensor embedding(const Tensor& ids, const Tensor& table, double scale, DType dtype);
Tensor softmax(const Tensor& x);  // along the last axis
struct AttentionOptions {
  double scale;       // multiplies q.k
  double dropout = 0; // of the probabilities
  RngKey key{};       // of a Mask with element ((b*H + h)*T + t)*64*ceil(T/64) + s
  // f32 [>=T, R], cos in even, sin in odd columns (engine/nn/rope.h makes it): its angles rotate interleaved pairs
  // (2i, 2i+1) of the last R columns of each head of q and k (Su et al., 2021). No tensor: nothing is rotated.
  Tensor angles = {};
};
// Causal attention: softmax(scale * q k^T, s <= t) v. q [B,T,H,Dk], k [B,T,H or 1,Dk] (one shared key head),
// v [B,T,H,Dv] -> [B,T,H,Dv]. On the GPU no [T, T] matrix reaches device memory but the mask, a bit an element. q and k
// are rotated in place where no one else holds them, as are those that are moved here.
Tensor attention(Tensor q, Tensor k, Tensor v, const AttentionOptions& options);
Tensor attention(Tensor qkv, const AttentionOptions& options);  // all three side by side: [B,T,3*H,D]

// ---- mixture of experts: which tokens go to which expert stays on the device
struct Routing {
  Tensor experts;  // i32 [N, K]: the chosen experts, best logit first; ties go to the lower index
  Tensor slots;    // i32 [N, K]: the row of choice (n, k) when all choices are sorted by expert (stable in n, then k)
  Tensor sources;  // i32 [N*K]: the inverse: choice n*K+k that stands in a row
  Tensor offsets;  // i32 [E+1]: expert e owns rows [offsets[e], offsets[e+1])
};
// x [N, D], weight [E, D] in f32 (f64 for f64) -> x times weight transposed in f32 (f64): [N, E], with noise *
// random_normal(key, i) added.
Tensor router_logits(const Tensor& x, const Tensor& weight, double noise = 0, RngKey key = {});
// Top-k routing by logits [N, E] in f32 (f64 on the CPU).
struct RouteOptions {
  int64_t chosen;                      // K
  std::optional<double> balance = {};  // weight of the balance loss, where there is one
};
struct Routed {
  Routing routing;  // not differentiable
  Tensor weights;   // [N, K]: softmax over the chosen logits
  // [] = its weight * E * sum_e (share of the N*K choices that went to e) * mean_n softmax(logits)[n, e] (Fedus et al.,
  // 2021)
  Tensor balance;   // no tensor where it has no weight
};
Routed route(const Tensor& logits, const RouteOptions& options);
Tensor gather_rows(const Tensor& x, const Routing& r);                      // [N, D] -> [N*K, D] sorted by expert
Tensor sum_rows(const Tensor& y, const Routing& r);                         // sum_k y[slots[n,k]]: [N*K, D] -> [N, D]
// add_rms_norm of x[n] = sum_k rows[slots[n,k]], rows [N*K, D] sorted by expert; the residual is like x [.., D].
NormedSum add_rms_norm(const Tensor& residual, const Tensor& rows, const Routing& r, const Tensor& weight, double eps,
                       double p = 0, RngKey key = {});
// Rows of expert e times w[e] transposed: x [R, I], w [E, O, I] -> [R, O]. Experts may be empty.
Tensor grouped_matmul(const Tensor& x, const Tensor& w, const Routing& r);
// weights[n,k] * down[e] dropout(silu(up[e] x[n]), p, key) in row slots[n,k], e the expert of choice (n, k); sum_rows
// or add_rms_norm make one row a token of it. x [N, D], up [E, F, D], down [E, D, F], weights [N, K] in f32 (f64 for
// f64) -> [N*K, D]. Element row*F + f of the mask is that of up's output sorted by expert. It saves x's rows by
// expert, up's output and what down multiplies; the gradient overwrites them.
Tensor expert_mlp(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& weights, const Routing& r,
                  double p, RngKey key);

// ---- loss
// Mean over rows of -log softmax(logits)[target]: logits [.., V], targets i32 -> [] in f32 (f64 for f64). The gradient
// overwrites the logits where no one else holds them. A target outside [0, V) throws on the CPU; on the GPU, which is
// not waited for, it makes the loss and the row's gradient nan.
Tensor cross_entropy(const Tensor& logits, const Tensor& targets);
// cross_entropy of the logits x [.., D] times weight [V, D] transposed, of which only those of `chunk_rows` rows exist at
// a time. The gradients are made along with the loss, so that backward has only to scale them.
constexpr int64_t kLogitRows = 4096;
Tensor linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets,
                            int64_t chunk_rows = kLogitRows);
struct Score {
  Tensor loss;     // [] in f32 (f64 for f64): cross_entropy
  Tensor correct;  // i32 []: count_correct
};
// Both of those logits, by chunks. Not differentiable.
Score linear_score(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t chunk_rows = kLogitRows);
// How many rows have their largest logit at the target (the lowest index among equals): i32 []. Not differentiable.
Tensor count_correct(const Tensor& logits, const Tensor& targets);

// ---- in place, not differentiable
void zero(const Tensor& x);                              // any dtype
void fill(const Tensor& x, double value);
void fill_normal(const Tensor& x, double std, RngKey key);  // std * random_normal(key, i)
void add_into(const Tensor& sum, const Tensor& x);       // sum += x; dtypes may differ
void copy_into(const Tensor& to, const Tensor& x);       // to = x, converting; same numel
// f32 values as Halves (engine/dtype.h), and back: x in f32, nearest in bf16, rest in u16, of one shape.
void split_halves(const Tensor& x, const Tensor& nearest, const Tensor& rest);
void join_halves(const Tensor& x, const Tensor& nearest, const Tensor& rest);
// Sum of squares of all of them: f32 []; a nan or infinity anywhere gives nan or infinity.
Tensor squared_norm(const std::vector<Tensor>& xs);

}  // namespace weft
