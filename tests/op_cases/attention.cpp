#include "tests/op_cases.h"

namespace weft {

void add_attention_cases(std::vector<OpCase>&) {}

}  // namespace weft
