// The model: a decoder with a mixture of experts in every block and the attention that its configuration names.
#pragma once
#include <vector>

#include "engine/nn/dropout.h"
#include "engine/nn/embedding.h"
#include "model/attention.h"
#include "model/moe.h"

namespace weft {

struct BlockOutput {
  NormedSum stream;  // with the norm that comes next
  Tensor balance;    // [] f32; no tensor outside training
  Routing routing;
};

struct Block {
  RmsNorm attention_norm, ffn_norm;
  Attention attention;
  Moe feed_forward;
  Dropout dropout;
  const char* attention_layer;  // names in memory reports
  const char* ffn_layer;

  Block(const Config& c, Scope s, const Rope& rope);
  // The residual stream [B, T, D] goes in under attention_norm and out under `next`: each addition to it and the norm
  // that reads it are one pass over memory, also from one block to the next.
  BlockOutput operator()(const NormedSum& stream, const RmsNorm& next, const Mode& mode) const;
};

struct Output {
  Tensor logits;                  // [B, T, V] in mode.compute
  Tensor aux;                     // [] f32, the balance losses' sum; no tensor outside training
  std::vector<Routing> routings;  // of each layer
};

struct Loss {
  Tensor total;                   // [] f32, ce + aux: what backward takes
  Tensor ce, aux;                 // [] f32; aux is no tensor outside training
  std::vector<Routing> routings;
};

struct Evaluated {
  Tensor loss;                    // [] f32, the cross-entropy
  Tensor correct;                 // [] i32: tokens whose largest logit is the target
  std::vector<Routing> routings;
};

struct Transformer {
  Config config;
  Embedding token_embedding;
  std::vector<Block> blocks;
  RmsNorm norm;
  Dropout dropout;

  // Throws Fault::config with all that is wrong with the configuration.
  Transformer(const Config& config, Scope scope);
  Output operator()(const Tensor& tokens, const Mode& mode) const;  // i32 [B, T]
  // Of the logits only those of a part of the tokens exist at a time.
  Loss loss(const Tensor& tokens, const Tensor& targets, const Mode& mode) const;
  Evaluated evaluate(const Tensor& tokens, const Tensor& targets, DType compute) const;  // not differentiable

 private:
  struct Hidden {
    Tensor x;  // [B, T, D], what the head takes
    Tensor aux;
    std::vector<Routing> routings;
  };
  Hidden hidden(const Tensor& tokens, const Mode& mode) const;
  Transformer(const Config& config, Scope scope, const Rope& rope);
};

// Sizes and costs, from the parameters that the building code itself makes; nothing is allocated.
Params counted_params(const Config& config);
int64_t parameter_count(const Config& config);
struct Part {
  const char* name;
  int64_t parameters;
};
std::vector<Part> parameters_by_part(const Params& params);  // embedding, attention, experts, router, norms: all of them
int64_t active_parameter_count(const Config& config);  // what one token passes through: top_k of the experts
// Floating-point operations of forward and backward per token of a text of `length`: 6 per active weight of a matrix
// product (the tied head included) and causal attention's scores and sums at half the square.
double flops_per_token(const Config& config, int64_t length);
// What generation keeps per token, all layers, in values of `bytes_per_value`.
int64_t kv_cache_bytes_per_token(const Config& config, int64_t bytes_per_value);

}  // namespace weft
