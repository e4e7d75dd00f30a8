// The table of attention configurations. To add one: a file with the attention, and a row in attention.cpp.
#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "engine/nn/mode.h"
#include "engine/nn/params.h"
#include "engine/nn/rope.h"
#include "model/config.h"

namespace weft {

using Attention = std::function<Tensor(const Tensor& x, const Mode& mode)>;  // [B, T, D] -> [B, T, D]

struct AttentionRow {
  std::string name, summary;
  bool latent;                               // has the latent fields of Config
  std::string attention_norm, ffn_norm;      // names of a block's norms
  void (*adjust)(Config&);                   // writes what sets this configuration apart, from the model's sizes
  Attention (*make)(const Config&, Scope, const Rope&);
  int64_t (*rotary_size)(const Config&);     // columns that are rotated
  int64_t (*score_width)(const Config&);     // key and value columns of all heads: attention's work per pair of tokens
  int64_t (*cache_width)(const Config&);     // values that generation must keep per token and layer
};

const std::vector<AttentionRow>& attention_table();
std::string attention_list();  // their names, comma-separated
// Throws Fault::config naming the rows there are.
const AttentionRow& attention_row(const std::string& name);

// `base` as the named configuration, where `overrides` (field, text) have the last word; those of latent attention are
// passed over where there is none.
using Overrides = std::vector<std::pair<std::string, std::string>>;
Config with_attention(Config base, const std::string& name, const Overrides& overrides = {});

RopeOptions rope_options(const Config& config);

}  // namespace weft
