// Reads .safetensors files, the form of the reference values in tests/reference. Used by parity and model_test.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "engine/tensor.h"

namespace weft {

// Names to tensors on the CPU, f32 or i32. Throws Fault::io or Fault::data, with the file's name, on anything that is
// not a whole and sound file.
std::map<std::string, Tensor> read_safetensors(const std::string& path);

}  // namespace weft
