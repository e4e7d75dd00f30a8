// The table of ops that op_test walks. One entry buys its checks (against its reference, f64 finite differences, bf16
// against f32, CPU against CUDA in f32 and bf16) and a benchmark. To add an op's entry, append it to its group's file in
// op_cases/.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "engine/ops.h"

namespace weft {

enum class Fill : uint8_t { normal, positive, ids };
// Which dtype an input has when the op is tested in a dtype: that one; at least f32 (f64 in f64); or always f32.
enum class Type : uint8_t { same, wide, f32 };

struct Input {
  Shape shape;
  Fill fill = Fill::normal;
  Type type = Type::same;
  bool differentiable = true;  // ids never are
  int64_t below = 0;           // of ids
};
using Inputs = std::vector<Input>;

inline Input constant(const Shape& shape, Type type = Type::same) {
  return {.shape = shape, .type = type, .differentiable = false};
}
inline Input ids(const Shape& shape, int64_t below) {
  return {.shape = shape, .fill = Fill::ids, .differentiable = false, .below = below};
}
inline Input wide(const Shape& shape) { return {.shape = shape, .type = Type::wide}; }

struct OpCase {
  using Function = std::function<Tensor(const std::vector<Tensor>& x)>;
  std::string name;
  std::vector<Inputs> sizes;  // each is checked; small ones, and not multiples of a tile
  Function run;
  Function reference = {};    // the same from simpler ops, with or without gradients
  int64_t reduction = 1;      // terms of the longest sum, for the tolerance
  int64_t products = 1;       // one after another; each rounds what the next one takes
  Inputs large = {};          // the benchmark's sizes; no benchmark when empty
  double flops = 0;           // of the benchmark's forward; 0: it is rated by bytes
  std::vector<DType> dtypes = {DType::f32, DType::bf16, DType::f64};
};

std::vector<OpCase> op_cases();

void add_elementwise_cases(std::vector<OpCase>& cases);
void add_layer_cases(std::vector<OpCase>& cases);
void add_attention_cases(std::vector<OpCase>& cases);
void add_expert_cases(std::vector<OpCase>& cases);
void add_head_cases(std::vector<OpCase>& cases);

}  // namespace weft
