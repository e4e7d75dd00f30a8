// The direction of #includes: engine <- model <- train; data takes only engine/check.h and engine/random.h; the report
// reads only files.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>

namespace {
namespace fs = std::filesystem;

// The folders a folder's files may include from, or single files.
const std::map<std::string, std::set<std::string>> kAllowed = {
    {"engine", {"engine"}},
    {"model", {"engine", "model"}},
    {"data", {"data", "engine/check.h", "engine/random.h"}},
    {"train", {"engine", "model", "data", "train"}},
    {"tools/report", {"tools", "engine/check.h"}},
};

std::string forbidden_include(const fs::path& file, const std::set<std::string>& allowed) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("#include \"")) continue;
    const std::string target = line.substr(10, line.find('"', 10) - 10);
    if (!allowed.contains(target) && !allowed.contains(target.substr(0, target.find('/')))) return target;
  }
  return "";
}

}  // namespace

TEST_CASE("files include only from their own layer and those below") {
  for (const auto& [folder, allowed] : kAllowed) {
    int files = 0;
    for (const auto& entry : fs::recursive_directory_iterator(fs::path(WEFT_SOURCE_DIR) / folder)) {
      if (!entry.is_regular_file()) continue;
      const std::string found = forbidden_include(entry.path(), allowed);
      CHECK_MESSAGE(found.empty(), entry.path().string() << " includes \"" << found << "\"");
      ++files;
    }
    CHECK_MESSAGE(files > 0, folder << " has no files: the rule checks nothing");
  }
}
