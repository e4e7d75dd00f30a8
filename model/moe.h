// Mixture of experts (Shazeer et al., 2017): every token goes to its top-k experts, none is dropped. The router runs
// in f32; which tokens go where stays on the device.
#pragma once
#include "engine/nn/dropout.h"
#include "engine/nn/linear.h"
#include "model/config.h"

namespace weft {

// E matrices as one parameter: rows of expert e times weight[e] transposed.
struct ExpertLinear {
  Tensor weight;  // [E, out, in]

  ExpertLinear(Scope s, int64_t experts, int64_t in, int64_t out, double std)
      : weight(s.param("weight", {experts, out, in}, normal(std), Kind::matrix)) {}
  Tensor operator()(const Tensor& x, const Routing& r) const {
    return grouped_matmul(x, cast(weight, x.dtype()), r);
  }
};

struct MoeOutput {
  Tensor y;        // [B, T, D]
  Tensor balance;  // [] f32; no tensor outside training
  Routing routing;
};

struct Moe {
  int64_t top_k;
  double noise, balance_weight;
  Linear gate;
  ExpertLinear linear1, linear2;
  Dropout dropout;

  Moe(const Config& c, Scope s)
      : top_k(c.top_k), noise(c.router_noise), balance_weight(c.balance_weight),
        gate(s / "router" / "gate", c.hidden_size, c.experts, c.init_std),
        linear1(s / "experts" / "linear1", c.experts, c.hidden_size, c.ffn_size, c.init_std),
        linear2(s / "experts" / "linear2", c.experts, c.ffn_size, c.hidden_size, c.init_std), dropout{c.dropout} {}

  MoeOutput operator()(const Tensor& x, const Mode& mode) const {  // [B, T, D]
    const Tensor rows = reshape(x, {x.shape().rows(), x.size(-1)});  // [N, D]
    Tensor logits = router_logits(rows, gate.weight);                // [N, E] f32
    if (mode.training && noise > 0) logits = add_normal(logits, noise, mode.key());
    const Routing r = route_top_k(logits, top_k);
    const Tensor hidden = dropout.of_silu(linear1(gather_rows(rows, r), r), mode);  // [N*K, F]
    const Tensor y = combine_rows(linear2(hidden, r), routing_weights(logits, r), r);
    return {reshape(y, x.shape()), mode.training ? scale(balance_loss(logits, r), balance_weight) : Tensor{}, r};
  }
};

}  // namespace weft
