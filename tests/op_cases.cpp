#include "tests/op_cases.h"

namespace weft {

std::vector<OpCase> op_cases() {
  std::vector<OpCase> cases;
  add_elementwise_cases(cases);
  add_layer_cases(cases);
  add_attention_cases(cases);
  add_expert_cases(cases);
  add_head_cases(cases);
  return cases;
}

}  // namespace weft
