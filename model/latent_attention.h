// `lora`, `enhanced`: multi-head latent attention (DeepSeek-V2, 2024; V3). Keys and values of all heads come from one
// narrow latent per token; the rotary part of the key is one head that all share. Queries may have a low rank too. What
// takes the layer's input is one product: alone, each is thin.
#pragma once
#include <cmath>
#include <optional>
#include <utility>

#include "engine/nn/linear.h"
#include "engine/nn/mode.h"
#include "engine/nn/rms_norm.h"
#include "engine/nn/rope.h"
#include "model/config.h"

namespace weft {

struct LatentAttention {
  int64_t heads, rotary, plain, value;  // sizes; `plain` is the part of a query and key without position
  double scale, dropout;
  JoinedLinear down;  // q_a_proj, or q_proj where queries have no low rank, and kv_a_proj_with_mqa
  std::optional<RmsNorm> q_a_layernorm;
  std::optional<Linear> q_b_proj;
  RmsNorm kv_a_layernorm;
  Linear kv_b_proj, o_proj;
  Rope rope;

  LatentAttention(const Config& c, Scope s, const Rope& rope)
      : heads(c.heads), rotary(c.qk_rope_head_dim), plain(c.qk_nope_head_dim),
        value(c.v_head_dim), scale(score_scale(c)), dropout(c.dropout),
        down(s, {c.q_lora_rank == 0
                     ? Linear(s / "q_proj", c.hidden_size, heads * (plain + rotary), c.init_std)
                     : Linear(s / "q_a_proj", c.hidden_size, c.q_lora_rank, c.init_std, bias(c)),
                 Linear(s / "kv_a_proj_with_mqa", c.hidden_size, c.kv_lora_rank + rotary, c.init_std, bias(c))}),
        kv_a_layernorm(s / "kv_a_layernorm", c.kv_lora_rank, c.rms_norm_eps),
        kv_b_proj(s / "kv_b_proj", c.kv_lora_rank, heads * (plain + value), c.init_std),
        o_proj(s / "o_proj", heads * value, c.hidden_size, c.init_std, bias(c)), rope(rope) {
    if (c.q_lora_rank == 0) return;
    q_a_layernorm.emplace(s / "q_a_layernorm", c.q_lora_rank, c.rms_norm_eps);
    q_b_proj.emplace(s / "q_b_proj", c.q_lora_rank, heads * (plain + rotary), c.init_std);
  }

  Tensor operator()(const Tensor& x, const Mode& mode) const {  // [B, T, D]
    const int64_t b = x.size(0), t = x.size(1);
    const int64_t query = heads * (plain + rotary), rank = q_b_proj ? q_b_proj->weight.size(1) : query;
    std::vector<Tensor> parts =
        split_last(down(x), {q_b_proj ? normed(*q_a_layernorm) : SplitPart{rank}, normed(kv_a_layernorm), {rotary}});
    if (q_b_proj) parts[0] = (*q_b_proj)(parts[0]);
    Tensor q = reshape(std::exchange(parts[0], {}), {b, t, heads, plain + rotary});

    Tensor k = reshape(std::exchange(parts[2], {}), {b, t, 1, rotary});  // all heads share it
    Tensor v = reshape(kv_b_proj(parts[1]), {b, t, heads, plain + value});
    if (plain > 0) {
      const std::vector<Tensor> apart = split_last(v, {{plain}, {value}});
      k = concat_last(apart[0], k);
      v = apart[1];
    }

    AttentionOptions options{.scale = scale, .angles = rope.angles(t)};
    if (mode.training && dropout > 0) options.dropout = dropout, options.key = mode.key();
    return o_proj(reshape(attention(std::move(q), std::move(k), v, options), {b, t, heads * value}));
  }

 private:
  static SplitPart normed(const RmsNorm& norm) { return {norm.weight.size(0), norm.weight, norm.eps}; }
  static Bias bias(const Config& c) { return c.attention_bias ? Bias::with : Bias::none; }
  static double score_scale(const Config& c) {
    const double m = c.rope_scaling == "yarn" && c.rope_mscale_all_dim != 0
                         ? yarn_mscale(c.rope_factor, c.rope_mscale_all_dim)
                         : 1;
    return m * m / std::sqrt(static_cast<double>(c.qk_nope_head_dim + c.qk_rope_head_dim));
  }
};

}  // namespace weft
