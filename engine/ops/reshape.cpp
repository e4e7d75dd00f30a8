// y = x under another shape; dx = dy under x's.
#include "engine/ops.h"

namespace weft {

Tensor reshape(const Tensor& x, const Shape& shape) {
  return record("reshape", x.view(shape), {x}, [from = x.shape()](const Tensor& dy) -> Gradients {
    return {dy.view(from)};
  });
}

}  // namespace weft
