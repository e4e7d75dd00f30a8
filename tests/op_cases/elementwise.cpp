// Element by element, shape, reductions, products, and what works in place.
#include "tests/op_cases.h"

namespace weft {

void add_elementwise_cases(std::vector<OpCase>& cases) {
  const Shape small{3, 37}, odd{5, 129, 3}, big{64, 1024, 1024};
  cases.push_back({.name = "silu", .sizes = {{{small}}, {{odd}}}, .run = [](auto& x) { return silu(x[0]); },
                   .large = {{big}}});
}

}  // namespace weft
