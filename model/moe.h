// Mixture of experts (Shazeer et al., 2017): every token goes to its top-k experts, none is dropped. The router runs
// in f32; which tokens go where stays on the device.
#pragma once
#include "engine/nn/linear.h"
#include "model/config.h"

namespace weft {

struct MoeOutput {
  Tensor rows;     // [B*T*K, D] sorted by expert: a token's rows sum to its output
  Tensor balance;  // [] f32; no tensor outside training
  Routing routing;
};

struct Moe {
  int64_t top_k;
  double noise, balance_weight;
  Linear gate;
  Tensor up, down;  // [E, F, D], [E, D, F]
  double dropout;

  Moe(const Config& c, Scope s)
      : top_k(c.top_k), noise(c.router_noise), balance_weight(c.balance_weight),
        gate(s / "router" / "gate", c.hidden_size, c.experts, c.init_std),
        up(experts(s, "linear1", c, c.ffn_size, c.hidden_size)),
        down(experts(s, "linear2", c, c.hidden_size, c.ffn_size)), dropout(c.dropout) {}

  MoeOutput operator()(const Tensor& x, const Mode& mode) const {  // [B, T, D]
    const Tensor rows = reshape(x, {x.shape().rows(), x.size(-1)});  // [N, D]
    const bool noisy = mode.training && noise > 0;
    const Tensor logits = noisy ? router_logits(rows, gate.weight, noise, mode.key())  // [N, E] f32
                                : router_logits(rows, gate.weight);
    RouteOptions options{.chosen = top_k};
    if (mode.training) options.balance = balance_weight;
    const Routed routed = route(logits, options);
    const Routing& r = routed.routing;
    const bool drops = mode.training && dropout > 0;
    return {expert_mlp(rows, cast(up, x.dtype()), cast(down, x.dtype()), routed.weights, r,
                       drops ? dropout : 0, drops ? mode.key() : RngKey{}),
            routed.balance, r};
  }

 private:
  static Tensor experts(Scope s, const char* name, const Config& c, int64_t out, int64_t in) {
    return (s / "experts" / name).param("weight", {c.experts, out, in}, normal(c.init_std), Kind::matrix);
  }
};

}  // namespace weft
