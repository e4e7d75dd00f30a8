// In place: nearest and rest = the halves of x; x = the floats that they are of.
#include "engine/ops.h"
#include "engine/ops/elementwise.h"

namespace weft {
namespace {

struct Nearest {
  const float* x;
  WEFT_HD uint16_t operator()(int64_t i) const { return halves_of(x[i]).nearest.bits; }
};
struct Rest {
  const float* x;
  WEFT_HD uint16_t operator()(int64_t i) const { return halves_of(x[i]).rest; }
};
struct Whole {
  const bf16* nearest;
  const uint16_t* rest;
  WEFT_HD float operator()(int64_t i) const { return whole_of({nearest[i], rest[i]}); }
};

void check_halves(const Tensor& x, const Tensor& nearest, const Tensor& rest) {
  check(x.shape() == nearest.shape() && x.shape() == rest.shape() && x.device() == nearest.device() &&
            x.device() == rest.device(),
        "values and their halves have one shape on one device, found {}, {} and {}", x.shape().str(),
        nearest.shape().str(), rest.shape().str());
}

}  // namespace

void split_halves(const Tensor& x, const Tensor& nearest, const Tensor& rest) {
  check_halves(x, nearest, rest);
  on_device(x.device(), [&](auto device) {
    map_indices(device, x.numel(), Nearest{x.data<float>()}, &nearest.data<bf16>()->bits);
    map_indices(device, x.numel(), Rest{x.data<float>()}, rest.data<uint16_t>());
  });
}

void join_halves(const Tensor& x, const Tensor& nearest, const Tensor& rest) {
  check_halves(x, nearest, rest);
  on_device(x.device(), [&](auto device) {
    map_indices(device, x.numel(), Whole{nearest.data<bf16>(), rest.data<uint16_t>()}, x.data<float>());
  });
}

}  // namespace weft
