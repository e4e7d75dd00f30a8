#include "model/transformer.h"

#include <algorithm>
#include <cmath>

namespace weft {
namespace {

const Config& validated(const Config& c) {
  validate(c);
  return c;
}

// The share of a parameter that one token passes through.
double active_share(const Config& c, const Parameter& p) {
  return p.of_experts() ? static_cast<double>(c.top_k) / c.experts : 1.0;
}

}  // namespace

Block::Block(const Config& c, Scope s, const Rope& rope)
    : attention_norm(s / attention_row(c.attention).attention_norm, c.hidden_size, c.rms_norm_eps),
      ffn_norm(s / attention_row(c.attention).ffn_norm, c.hidden_size, c.rms_norm_eps),
      attention(attention_row(c.attention).make(c, s / "attention", rope)), feed_forward(c, s / "feed_forward"),
      dropout{c.dropout}, attention_layer(interned((s / "attention").prefix())),
      ffn_layer(interned((s / "feed_forward").prefix())) {}

BlockOutput Block::operator()(const NormedSum& stream, const RmsNorm& next, const Mode& mode) const {
  NormedSum middle;
  {
    MemoryScope memory(Category::activation, attention_layer);
    middle = dropout.onto(stream.sum, attention(stream.normed, mode), ffn_norm, mode);
  }
  MemoryScope memory(Category::activation, ffn_layer);
  MoeOutput out = feed_forward(middle.normed, mode);
  return {dropout.onto(middle.sum, out.rows, out.routing, next, mode), out.balance, out.routing};
}

Transformer::Transformer(const Config& config, Scope scope)
    : Transformer(validated(config), scope,
                  Rope(rope_options(config), scope.counting() ? 1 : config.max_seq_len, scope.device())) {}

Transformer::Transformer(const Config& c, Scope s, const Rope& rope)
    : config(c),
      token_embedding(s / "token_embedding", c.vocab_size, c.hidden_size, c.init_std,
                      std::sqrt(static_cast<double>(c.hidden_size))),
      blocks([&] {
        std::vector<Block> made;
        for (int64_t i = 0; i < c.layers; ++i) made.emplace_back(c, s / "transformer_blocks" / std::to_string(i), rope);
        return made;
      }()),
      norm(s / "norm", c.hidden_size, c.rms_norm_eps), dropout{c.dropout} {}

Transformer::Hidden Transformer::hidden(const Tensor& tokens, const Mode& mode) const {
  check(tokens.rank() == 2 && tokens.size(1) <= config.max_seq_len, "tokens must be [B, T <= {}], found {}",
        config.max_seq_len, tokens.shape().str());
  Hidden out;
  const auto norm_before = [&](size_t block) -> const RmsNorm& {
    return block < blocks.size() ? blocks[block].attention_norm : norm;
  };
  NormedSum stream;
  {
    MemoryScope memory(Category::activation, "token_embedding");
    stream = dropout.onto({}, token_embedding(tokens, mode.compute), norm_before(0), mode);
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    BlockOutput y = blocks[i](stream, norm_before(i + 1), mode);
    stream = y.stream;
    if (y.balance) out.aux = out.aux ? add(out.aux, y.balance) : y.balance;
    out.routings.push_back(std::move(y.routing));
  }
  MemoryScope memory(Category::activation, "head");
  out.x = dropout(stream.normed, mode);
  return out;
}

Output Transformer::operator()(const Tensor& tokens, const Mode& mode) const {
  Hidden h = hidden(tokens, mode);
  MemoryScope memory(Category::activation, "head");
  return {token_embedding.logits(h.x), h.aux, std::move(h.routings)};
}

Loss Transformer::loss(const Tensor& tokens, const Tensor& targets, const Mode& mode) const {
  Hidden h = hidden(tokens, mode);
  MemoryScope memory(Category::activation, "head");
  const Tensor ce = token_embedding.cross_entropy(h.x, targets);
  return {h.aux ? add(ce, h.aux) : ce, ce, h.aux, std::move(h.routings)};
}

Evaluated Transformer::evaluate(const Tensor& tokens, const Tensor& targets, DType compute) const {
  const NoGrad no_grad;
  Hidden h = hidden(tokens, {.compute = compute});
  MemoryScope memory(Category::activation, "head");
  const Score score = token_embedding.score(h.x, targets);
  return {score.loss, score.correct, std::move(h.routings)};
}

Params counted_params(const Config& config) {
  Params params(Params::Build::count_only);
  const Transformer model(config, Scope(params, Device::cpu, 0));
  return params;
}

int64_t parameter_count(const Config& config) { return counted_params(config).count(); }

std::vector<Part> parameters_by_part(const Params& params) {
  std::vector<Part> parts{{"embedding", 0}, {"attention", 0}, {"experts", 0}, {"router", 0}, {"norms", 0}};
  for (const Parameter& p : params.list()) {
    const auto within = [&](const char* layer) { return p.name.find(layer) != std::string::npos; };
    const bool norm = p.kind == Kind::vector && p.name.ends_with(".weight");  // latent attention has norms of its own
    const char* part = p.kind == Kind::embedding ? "embedding" : norm ? "norms" : within(".attention.") ? "attention"
                       : within(".experts.") ? "experts" : within(".router.") ? "router" : "";
    const auto found = std::find_if(parts.begin(), parts.end(), [&](const Part& x) { return std::string_view(x.name) == part; });
    check(found != parts.end(), "parameter {} must belong to a part of the model", p.name);
    found->parameters += p.shape.numel();
  }
  return parts;
}

int64_t active_parameter_count(const Config& config) {
  const Params params = counted_params(config);
  double n = 0;
  for (const Parameter& p : params.list()) n += active_share(config, p) * p.shape.numel();
  return std::llround(n);
}

double flops_per_token(const Config& config, int64_t length) {
  const Params params = counted_params(config);
  double weights = 0;
  for (const Parameter& p : params.list())
    if (p.kind != Kind::vector) weights += active_share(config, p) * p.shape.numel();
  const int64_t width = config.layers * attention_row(config.attention).score_width(config);
  return 6 * (weights + static_cast<double>(width) * length / 2);
}

int64_t kv_cache_bytes_per_token(const Config& config, int64_t bytes_per_value) {
  return config.layers * attention_row(config.attention).cache_width(config) * bytes_per_value;
}

}  // namespace weft
