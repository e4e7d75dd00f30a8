// How a forward pass runs; every layer that behaves differently in training takes one.
#pragma once
#include "engine/dtype.h"
#include "engine/random.h"

namespace weft {

struct Mode {
  bool training = false;      // dropout, router noise, the balance loss
  Rng* rng = nullptr;         // of this step; needed in training where something is random
  DType compute = DType::f32; // of activations and matrix products

  RngKey key() const {
    check(rng != nullptr, "training with dropout or router noise needs a random sequence");
    return rng->next();
  }
};

}  // namespace weft
