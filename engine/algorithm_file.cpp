#include "engine/algorithm_file.h"

#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include "engine/check.h"
#include "engine/random.h"

namespace weft {
namespace fs = std::filesystem;
namespace {

constexpr const char* kTitle = "weft's algorithms for matrix products, 1";

// The file: the title, the machine, a line per product, and the FNV-1a of all that stands above it.
std::string text_of(const std::string& machine,
                    const std::map<AlgorithmFile::Product, AlgorithmFile::Algorithm>& known) {
  std::string text = fmt::format("{}\n{}\n", kTitle, machine);
  for (const auto& [product, algorithm] : known) {
    for (const int64_t value : product) text += fmt::format("{} ", value);
    text += ":";
    for (const uint64_t word : algorithm) text += fmt::format(" {:016x}", word);
    text += "\n";
  }
  return text + fmt::format("{:016x}\n", stream_of(text));
}

// What the text holds, or nothing where it is not whole.
std::optional<std::map<AlgorithmFile::Product, AlgorithmFile::Algorithm>> parsed(const std::string& text) {
  std::map<AlgorithmFile::Product, AlgorithmFile::Algorithm> known;
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line), std::getline(lines, line);
  const std::string machine = line;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    AlgorithmFile::Product product;
    AlgorithmFile::Algorithm algorithm;
    std::string colon;
    for (int64_t& value : product) words >> value;
    words >> colon >> std::hex;
    for (uint64_t& word : algorithm) words >> word;
    if (words && colon == ":") known[product] = algorithm;
  }
  if (text_of(machine, known) != text) return std::nullopt;
  return known;
}

}  // namespace

AlgorithmFile::AlgorithmFile(const std::string& path, const std::string& machine) : path_(path), machine_(machine) {
  std::error_code error;
  if (!fs::exists(path, error)) return;
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::string why;
  if (!file)
    why = "cannot be read";
  else if (!text.starts_with(fmt::format("{}\n", kTitle)))
    why = "is no file of algorithms, or of another version";
  else if (!text.starts_with(fmt::format("{}\n{}\n", kTitle, machine)))
    why = fmt::format("was made on another GPU or library than {}", machine);
  else if (auto known = parsed(text))
    known_ = std::move(*known);
  else
    why = "is damaged";
  if (!why.empty())
    fmt::print(stderr, "note: {}: {}; the algorithms are timed again and the file is replaced\n", path, why);
}

const AlgorithmFile::Algorithm* AlgorithmFile::find(const Product& product) const {
  const auto at = known_.find(product);
  return at == known_.end() ? nullptr : &at->second;
}

void AlgorithmFile::keep(const Product& product, const Algorithm& algorithm) {
  known_[product] = algorithm;
  if (!writable_) return;
  std::error_code error;
  const fs::path target(path_), draft = path_ + fmt::format(".{}.part", getpid());
  if (target.has_parent_path()) fs::create_directories(target.parent_path(), error);
  std::ofstream file(draft, std::ios::binary);
  file << text_of(machine_, known_);
  file.close();
  std::string why = file ? "" : std::strerror(errno);
  if (file) {
    fs::rename(draft, target, error);
    if (error) why = error.message();
  }
  if (why.empty()) return;
  fs::remove(draft, error);
  writable_ = false;
  fmt::print(stderr, "note: {}: cannot be written: {}; the chosen algorithms are not kept\n", path_, why);
}

std::string default_algorithm_file(const std::string& machine) {
  std::string name;
  for (const char c : machine) name += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  const auto set = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value ? value : "");
  };
  // The XDG base directory specification: a relative path is to be ignored.
  std::string folder = set("XDG_CACHE_HOME");
  if (!folder.starts_with('/')) folder = set("HOME").empty() ? "" : set("HOME") + "/.cache";
  return folder.empty() ? "" : fmt::format("{}/weft/gemm_{}.txt", folder, name);
}

}  // namespace weft
