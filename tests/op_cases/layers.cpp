#include "tests/op_cases.h"

namespace weft {

void add_layer_cases(std::vector<OpCase>&) {}

}  // namespace weft
