#include "train/run_folder.h"

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "engine/check.h"

namespace weft {
namespace fs = std::filesystem;

RunFolder::RunFolder(const std::string& path) : path_(path) {
  std::error_code error;
  if (fs::exists(path, error)) {
    if (!fs::is_directory(path, error)) fail(Fault::usage, "--out {}: a file is there, expected a new folder", path);
    const bool empty = fs::is_empty(path, error);
    if (error) fail(Fault::io, "--out {}: cannot be read: {}", path, error.message());
    if (!empty)
      fail(Fault::usage, "--out {}: the folder already holds {}; choose a new one", path,
           fs::exists(fs::path(path) / "results.json") ? "a run" : "files");
  } else {
    fs::create_directories(path, error);
    if (error) fail(Fault::io, "--out {}: cannot be made: {}", path, error.message());
  }
  metrics_.open(fs::path(path) / "metrics.jsonl");
  if (!metrics_) fail(Fault::io, "--out {}: cannot be written: {}", path, std::strerror(errno));
}

void RunFolder::write(const std::string& name, const Json& content) const {
  const fs::path target = fs::path(path_) / name, draft = fs::path(path_) / ("." + name + ".part");
  {
    std::ofstream file(draft);
    file << content.dump(2) << '\n';
    file.close();
    if (!file) fail(Fault::io, "{}: writing failed: {}", draft.string(), std::strerror(errno));
  }
  std::error_code error;
  fs::rename(draft, target, error);
  if (error) fail(Fault::io, "{}: cannot be replaced: {}", target.string(), error.message());
}

void RunFolder::append_metric(const Json& point) {
  metrics_ << point.dump() << std::endl;
  if (!metrics_) fail(Fault::io, "{}/metrics.jsonl: writing failed: {}", path_, std::strerror(errno));
}

}  // namespace weft
