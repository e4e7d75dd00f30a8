// Dropout that is there only in training.
#pragma once
#include "engine/nn/mode.h"
#include "engine/nn/rms_norm.h"

namespace weft {

struct Dropout {
  double p;
  Tensor operator()(const Tensor& x, const Mode& mode) const {
    return active(mode) ? dropout(x, p, mode.key()) : x;
  }
  // residual + the same of x (without a residual the same of x), and the norm of that.
  NormedSum onto(const Tensor& residual, const Tensor& x, const RmsNorm& norm, const Mode& mode) const {
    return active(mode) ? add_rms_norm(residual, x, norm.weight, norm.eps, p, mode.key())
                        : add_rms_norm(residual, x, norm.weight, norm.eps);
  }
  // The same of the sum of a token's rows, which are sorted by expert.
  NormedSum onto(const Tensor& residual, const Tensor& rows, const Routing& r, const RmsNorm& norm,
                 const Mode& mode) const {
    return active(mode) ? add_rms_norm(residual, rows, r, norm.weight, norm.eps, p, mode.key())
                        : add_rms_norm(residual, rows, r, norm.weight, norm.eps);
  }

 private:
  bool active(const Mode& mode) const { return mode.training && p > 0; }
};

}  // namespace weft
