#include "tests/safetensors.h"

#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

namespace weft {
namespace {

Tensor read_tensor(const std::string& where, const nlohmann::json& entry, const std::vector<char>& file,
                   uint64_t data) {
  const std::string type = entry.at("dtype").get<std::string>();
  if (type != "F32" && type != "I32") fail(Fault::data, "{}: dtype {}, where F32 or I32 is read", where, type);
  const auto shape_json = entry.at("shape").get<std::vector<int64_t>>();
  if (shape_json.size() > Shape::kMaxRank)
    fail(Fault::data, "{}: {} axes, at most {} are read", where, shape_json.size(), Shape::kMaxRank);
  Shape shape;
  int64_t bytes = 4;
  for (const int64_t d : shape_json) {
    if (d < 0 || __builtin_mul_overflow(bytes, d, &bytes)) fail(Fault::data, "{}: impossible shape", where);
    shape.push_back(d);
  }
  const auto offsets = entry.at("data_offsets").get<std::vector<uint64_t>>();
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > file.size() - data ||
      offsets[1] - offsets[0] != static_cast<uint64_t>(bytes))
    fail(Fault::data, "{}: its place in the file does not hold the {} bytes of shape {}", where, bytes, shape.str());
  const Tensor t = Tensor::empty(shape, type == "F32" ? DType::f32 : DType::i32, Device::cpu);
  if (bytes > 0) std::memcpy(t.raw(), file.data() + data + offsets[0], static_cast<size_t>(bytes));
  return t;
}

}  // namespace

std::map<std::string, Tensor> read_safetensors(const std::string& path) {
  static_assert(std::endian::native == std::endian::little);
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(Fault::io, "{}: cannot be opened", path);
  const std::vector<char> file((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  uint64_t header = 0;
  if (file.size() < sizeof header)
    fail(Fault::data, "{}: {} bytes, a safetensors file has at least 8", path, file.size());
  std::memcpy(&header, file.data(), sizeof header);
  if (header > file.size() - sizeof header)
    fail(Fault::data, "{}: a header of {} bytes in a file of {}", path, header, file.size());
  const uint64_t data = sizeof header + header;

  std::map<std::string, Tensor> tensors;
  try {
    const auto json = nlohmann::json::parse(file.begin() + sizeof header, file.begin() + static_cast<int64_t>(data));
    for (const auto& [name, entry] : json.items())
      if (name != "__metadata__") tensors[name] = read_tensor(path + ": " + name, entry, file, data);
  } catch (const nlohmann::json::exception& e) {
    fail(Fault::data, "{}: not a safetensors header: {}", path, e.what());
  }
  return tensors;
}

}  // namespace weft
