// `baseline`: causal multi-head attention with one fused projection and rotary queries and keys.
#pragma once
#include <cmath>
#include <utility>

#include "engine/nn/linear.h"
#include "engine/nn/mode.h"
#include "engine/nn/rope.h"
#include "model/config.h"

namespace weft {

struct MultiHeadAttention {
  int64_t width, heads;
  double dropout;
  Linear qkv, w_o;
  Rope rope;

  MultiHeadAttention(const Config& c, Scope s, const Rope& rope)
      : width(c.hidden_size), heads(c.heads), dropout(c.dropout), qkv(s / "qkv", width, 3 * width, c.init_std),
        w_o(s / "w_o", width, width, c.init_std), rope(rope) {}

  Tensor operator()(const Tensor& x, const Mode& mode) const {  // [B, T, D]
    const int64_t b = x.size(0), t = x.size(1), head = width / heads;
    AttentionOptions options{.scale = 1 / std::sqrt(static_cast<double>(head)), .angles = rope.angles(t)};
    if (mode.training && dropout > 0) options.dropout = dropout, options.key = mode.key();
    Tensor projected = reshape(qkv(x), {b, t, 3 * heads, head});
    return w_o(reshape(attention(std::move(projected), options), {b, t, width}));
  }
};

}  // namespace weft
