#include "model/attention.h"

#include <algorithm>

#include "model/latent_attention.h"
#include "model/multi_head_attention.h"

namespace weft {
namespace {

// Ranks as shares of the width (128 and 256 of 768), in whole eights for the matrix units.
int64_t share_of(int64_t width, int64_t parts) { return std::max<int64_t>(8, (width / parts + 7) / 8 * 8); }

void adjust_baseline(Config& c) {
  c.q_lora_rank = c.kv_lora_rank = c.qk_rope_head_dim = c.qk_nope_head_dim = c.v_head_dim = 0;
  c.attention_bias = false;
}

void adjust_lora(Config& c) {
  c.q_lora_rank = share_of(c.hidden_size, 6);
  c.kv_lora_rank = share_of(c.hidden_size, 3);
  c.qk_nope_head_dim = 0;
  c.qk_rope_head_dim = c.v_head_dim = c.head_dim();
  c.attention_bias = false;
  c.rms_norm_eps = 1e-6;
}

void adjust_enhanced(Config& c) {
  adjust_lora(c);
  c.qk_rope_head_dim = 2 * c.head_dim();
  c.v_head_dim = 3 * c.head_dim();
  c.attention_bias = true;
  c.rope_scaling = "linear";
  c.rope_factor = 2;
}

template <class A>
Attention make(const Config& c, Scope s, const Rope& rope) {
  return A(c, s, rope);
}

int64_t multi_head_rotary(const Config& c) { return c.head_dim(); }
int64_t multi_head_score(const Config& c) { return 2 * c.hidden_size; }
int64_t multi_head_cache(const Config& c) { return 2 * c.hidden_size; }
int64_t latent_rotary(const Config& c) { return c.qk_rope_head_dim; }
int64_t latent_score(const Config& c) { return c.heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim); }
int64_t latent_cache(const Config& c) { return c.kv_lora_rank + c.qk_rope_head_dim; }

}  // namespace

const std::vector<AttentionRow>& attention_table() {
  static const std::vector<AttentionRow> rows = {
      {"baseline", "multi-head attention", false, "norm1", "norm2", adjust_baseline, make<MultiHeadAttention>,
       multi_head_rotary, multi_head_score, multi_head_cache},
      {"lora", "latent attention with low-rank queries, keys and values", true, "input_layernorm",
       "post_attention_layernorm", adjust_lora, make<LatentAttention>, latent_rotary, latent_score, latent_cache},
      {"enhanced", "latent attention with larger heads, biases and linear RoPE scaling", true, "input_layernorm",
       "post_attention_layernorm", adjust_enhanced, make<LatentAttention>, latent_rotary, latent_score, latent_cache},
  };
  return rows;
}

std::string attention_list() {
  std::string names;
  for (const AttentionRow& row : attention_table()) names += (names.empty() ? "" : ", ") + row.name;
  return names;
}

const AttentionRow& attention_row(const std::string& name) {
  for (const AttentionRow& row : attention_table())
    if (row.name == name) return row;
  fail(Fault::config, "unknown configuration '{}'; there are {}", name, attention_list());
}

Config with_attention(Config base, const std::string& name, const Overrides& overrides) {
  const AttentionRow& row = attention_row(name);
  const auto override_fields = [&] {
    for (const auto& [field, text] : overrides) {
      const bool latent_only = std::any_of(config_fields().begin(), config_fields().end(),
                                           [&](const ConfigField& f) { return f.name == field && f.latent_only; });
      if (row.latent || !latent_only) set_field(base, field, text);
    }
  };
  override_fields();  // first the sizes that the row's values follow from
  check(base.heads > 0, "a configuration has heads, found {}", base.heads);
  row.adjust(base);
  override_fields();
  base.attention = name;
  return base;
}

RopeOptions rope_options(const Config& c) {
  const RopeScaling scaling = c.rope_scaling == "linear"    ? RopeScaling::linear
                              : c.rope_scaling == "dynamic" ? RopeScaling::dynamic
                              : c.rope_scaling == "yarn"    ? RopeScaling::yarn
                                                            : RopeScaling::none;
  return {.dim = attention_row(c.attention).rotary_size(c),
          .base = c.rope_base,
          .scaling = scaling,
          .factor = c.rope_factor,
          .original_length = c.rope_original_length,
          .beta_fast = c.rope_beta_fast,
          .beta_slow = c.rope_beta_slow,
          .mscale = c.rope_mscale,
          .mscale_all_dim = c.rope_mscale_all_dim};
}

}  // namespace weft
