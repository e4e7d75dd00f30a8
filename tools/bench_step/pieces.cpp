#include "tools/bench_step/pieces.h"

#include <algorithm>

#include "model/attention.h"
#include "model/transformer.h"

namespace weft {
namespace {

constexpr std::string_view kHead = "head";  // the matmul that gives logits

// The first row that fits an item is its own. An empty name fits all owners, an empty kernel all kernels; otherwise the
// kernel's name must contain it.
struct Row {
  std::string_view name;
  enum class Of : uint8_t { both, forward, gradient } work;
  const char* kernel;
  const char* piece;
};
using Of = Row::Of;

constexpr Row kRows[] = {
    {"embedding", Of::both, "", "embedding"},
    {"rms_norm", Of::both, "", "norms, residual"},
    {"add_rms_norm", Of::both, "", "norms, residual"},
    {"dropout", Of::both, "", "norms, residual"},
    {"matmul", Of::forward, "", "projections, forward"},
    {"matmul", Of::gradient, "", "projections, backward"},
    {"matmul_joined", Of::forward, "", "projections, forward"},
    {"matmul_joined", Of::gradient, "", "projections, backward"},
    {"split_last", Of::both, "", "norms, residual"},
    {"concat_last", Of::both, "", "rotary, splits"},
    {"attention", Of::both, "rotate_", "rotary, splits"},
    {"reshape", Of::both, "", "rotary, splits"},
    {"attention", Of::forward, "", "attention, forward"},
    {"attention", Of::gradient, "", "attention, backward"},
    {"router_logits", Of::both, "", "routing"},
    {"route", Of::both, "", "routing"},
    {"gather_rows", Of::both, "", "expert rows"},
    {"sum_rows", Of::both, "", "expert rows"},
    {"expert_mlp", Of::both, "gather", "expert rows"},
    {"expert_mlp", Of::both, "activate_rows", "expert activation"},
    {"expert_mlp", Of::both, "sum_choices", "expert rows"},
    {"grouped_matmul", Of::forward, "", "experts, forward"},
    {"expert_mlp", Of::forward, "", "experts, forward"},
    {"grouped_matmul", Of::gradient, kOnCpu, "experts, backward"},
    {"expert_mlp", Of::gradient, kOnCpu, "experts, backward"},
    {"grouped_matmul", Of::gradient, "Product)2", "experts, weight gradient"},
    {"expert_mlp", Of::gradient, "Product)2", "experts, weight gradient"},
    {"grouped_matmul", Of::gradient, "", "experts, input gradient"},
    {"expert_mlp", Of::gradient, "", "experts, input gradient"},
    {"silu", Of::both, "", "expert activation"},
    {"linear_cross_entropy", Of::both, "row_losses", "cross-entropy"},
    {"linear_cross_entropy", Of::both, "totals", "cross-entropy"},
    {"linear_cross_entropy", Of::both, "scale_by", "gradient sums"},
    {"linear_cross_entropy", Of::both, "", "head"},
    {kHead, Of::both, "", "head"},
    {"cross_entropy", Of::both, "", "cross-entropy"},
    {"cast", Of::both, "", "weight casts"},
    {"squared_norm", Of::both, "", "gradient norm"},
    {"clip", Of::both, "", "gradient norm"},
    {"adamw", Of::both, "", "optimizer"},
    {"muon", Of::both, "", "optimizer"},
    {"", Of::both, "square_ranges", "gradient norm"},
    {"", Of::both, "add_up_ranges", "gradient norm"},
    {"", Of::both, "adamw", "optimizer"},
    {"", Of::both, "muon", "optimizer"},
};
constexpr const char* kSums = "gradient sums";
constexpr const char* kOther = "other";

class Works {
 public:
  Works(const StepSize& size, const Capability& device) : value_(static_cast<double>(size.value_bytes)), device_(device) {}

  // `count` products of [m, k] with `weights` matrices [k, n], which are read or, as gradients, written.
  void products(const std::string& piece, double m, double k, double n, double weights, double count) {
    const double flops = 2 * m * k * n, bytes = value_ * (m * (k + n) + weights * k * n);
    add(piece, count * flops, count * bytes, count * std::max(flops / device_.flops, bytes / device_.bytes));
  }
  void pass(const std::string& piece, double bytes) { add(piece, 0, bytes, bytes / device_.bytes); }
  void avoidable_pass(const std::string& piece, double bytes) { add(piece, 0, bytes, 0); }

  std::map<std::string, PieceWork> all;

 private:
  void add(const std::string& piece, double flops, double bytes, double seconds) {
    PieceWork& w = all[piece];
    w.flops += flops, w.bytes += bytes, w.floor_ms += 1e3 * seconds;
  }

  double value_;
  Capability device_;
};

bool fits(const Row& row, const Item& item, std::string_view name) {
  const bool work = row.work == Of::both || (row.work == Of::forward) == (item.owner.work == Work::forward);
  return (row.name.empty() || name == row.name) && work && item.name.find(row.kernel) != std::string::npos;
}

}  // namespace

std::string piece_of(const Item& item, const Config& config) {
  if (item.owner.work == Work::sum) return kSums;
  const Shape& y = item.owner.output;
  const bool head = item.owner.name == "matmul" && y.rank() > 0 && y[-1] == config.vocab_size;
  for (const Row& row : kRows)
    if (fits(row, item, head ? kHead : item.owner.name)) return row.piece;
  return kOther;
}

const std::vector<std::string>& piece_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const Row& row : kRows)
      if (std::find(found.begin(), found.end(), row.piece) == found.end()) found.push_back(row.piece);
    for (const char* last : {kSums, kOther})
      if (std::find(found.begin(), found.end(), last) == found.end()) found.push_back(last);
    return found;
  }();
  return names;
}

// N tokens, D width, L layers, E experts of which a token uses K, F their hidden width, V vocabulary, P parameters,
// s bytes of an activation, and of a weight and its gradient where products read and write them; what AdamW keeps is f32.
std::map<std::string, PieceWork> piece_work(const Config& c, const StepSize& size, const Capability& device) {
  const auto number = [](int64_t x) { return static_cast<double>(x); };
  const double n = number(size.batch * size.seq), d = number(c.hidden_size), layers = number(c.layers);
  const double experts = number(c.experts), rows = n * number(c.top_k), f = number(c.ffn_size), v = number(c.vocab_size);
  const double s = number(size.value_bytes), parameters = number(parameter_count(c));
  const AttentionRow& row = attention_row(c.attention);
  Works works(size, device);

  const Params params = counted_params(c);
  double matrices = 0, copied = 0;  // elements that products read; that keep a copy (the experts' are split)
  for (const Parameter& p : params.list()) {
    if (p.kind != Kind::vector) matrices += number(p.shape.numel());
    if (!p.of_experts()) copied += number(p.shape.numel());
    if (p.kind == Kind::matrix && p.shape.rank() == 2 && p.name.find(".attention.") != std::string::npos) {
      const double out = number(p.shape[0]), in = number(p.shape[1]);
      works.products("projections, forward", n, in, out, 1, 1);
      works.products("projections, backward", n, out, in, 1, 1);  // dx = dy w
      works.products("projections, backward", n, in, out, 1, 1);      // dw = dy^T x
    }
    // A latent's norm: x read, y written; x, dy read, dx written.
    if (p.kind == Kind::vector && p.name.find(".attention.") != std::string::npos && p.name.ends_with(".weight"))
      works.pass("norms, residual", 5 * s * n * number(p.shape.numel()));
  }
  works.pass("embedding", (4 + s) * n * d + (s + 8) * n * d);
  // A branch and the residual before it read, the residual after it and its norm written; backward the gradients of the
  // latter two and the residual read, those of the former two written. The experts' branch is a token's rows.
  works.pass("norms, residual", s * d * ((2 * layers + 1) * 9 * n + layers * 2 * (rows - n)));

  // Half of all pairs of positions: q k^T and p v; backward q k^T again, and dv, dp, dq, dk.
  const double pairs = n * number(size.seq) / 2;
  const double value_width = number(row.latent ? c.heads * c.v_head_dim : c.hidden_size);
  const double key_width = number(row.score_width(c)) - value_width;
  const double shared_keys = row.latent ? number(c.qk_nope_head_dim * c.heads + c.qk_rope_head_dim) : key_width;
  const double key_bytes = s * n * (key_width + shared_keys), value_bytes = s * n * value_width;
  const auto attention = [&](const std::string& piece, double flops, double bytes) {
    PieceWork& w = works.all[piece];
    w.flops = layers * flops, w.bytes = layers * bytes;
    w.floor_ms = layers * 1e3 * std::max(flops / device.flops, bytes / device.bytes);
  };
  attention("attention, forward", 2 * pairs * (key_width + value_width), key_bytes + 2 * value_bytes);
  attention("attention, backward", 2 * pairs * (3 * key_width + 2 * value_width), 2 * key_bytes + 4 * value_bytes);
  works.avoidable_pass("rotary, splits", layers * 2 * key_bytes);  // queries and keys, turned in place; not those back

  works.pass("routing", layers * s * d * (3 * n + rows));  // x read; x and the gradients of its rows read, dx written
  works.pass("expert rows", layers * s * d * (n + rows));  // x read, its rows written
  for (const auto& [in, out] : {std::pair(d, f), std::pair(f, d)}) {
    works.products("experts, forward", rows, in, out, experts, layers);
    const bool whole = size.device == Device::cpu;  // where only ops are timed
    works.products(whole ? "experts, backward" : "experts, input gradient", rows, out, in, experts, layers);
    works.products(whole ? "experts, backward" : "experts, weight gradient", rows, in, out, experts, layers);
  }
  works.avoidable_pass("expert activation", layers * 5 * s * rows * f);
  works.products("head", n, d, v, 1, 1);
  works.products("head", n, v, d, 1, 1);
  works.products("head", n, d, v, 1, 1);
  works.pass("cross-entropy", 2 * s * n * v);  // logits read, their gradient written over them
  if (size.value_bytes != 4) works.avoidable_pass("weight casts", (4 + s) * matrices);
  // w, m, v and the gradient read; w, m, v and, where products read another type, copies of w in it written.
  works.pass("optimizer", (24 + s) * parameters + (s == 4 ? 0 : s) * copied);
  return std::move(works.all);
}

}  // namespace weft
