// A table of vectors by id, scaled; and the head that is tied to it, alone or with its loss.
#pragma once
#include "engine/nn/params.h"

namespace weft {

struct Embedding {
  Tensor weight;  // [V, D]
  double scale;   // of what is looked up; the tied head is not scaled

  Embedding(Scope s, int64_t vocabulary, int64_t dim, double std, double scale)
      : weight(s.param("weight", {vocabulary, dim}, normal(std), Kind::embedding)), scale(scale) {}
  Tensor operator()(const Tensor& ids, DType dtype) const { return embedding(ids, weight, scale, dtype); }
  Tensor logits(const Tensor& x) const { return matmul(x, head(x), Transpose::b); }
  Tensor cross_entropy(const Tensor& x, const Tensor& targets) const {
    return linear_cross_entropy(x, head(x), targets);
  }
  Score score(const Tensor& x, const Tensor& targets) const { return linear_score(x, head(x), targets); }

 private:
  Tensor head(const Tensor& x) const { return cast(weight, x.dtype()); }
};

}  // namespace weft
