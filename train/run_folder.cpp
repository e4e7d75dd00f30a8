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
           fs::exists(fs::path(path) / "results.json", error) ? "a run" : "files");
  } else {
    fs::create_directories(path, error);
    if (error) fail(Fault::io, "--out {}: cannot be made: {}", path, error.message());
  }
  open_metrics();
}

RunFolder RunFolder::existing(const std::string& path) {
  for (const char* name : {"resolved_config.json", "results.json"}) {
    std::error_code error;
    const fs::file_type type = fs::status(fs::path(path) / name, error).type();
    if (type == fs::file_type::none)
      fail(Fault::io, "--resume --out {}: {} cannot be read: {}", path, name, error.message());
    if (type != fs::file_type::regular)
      fail(Fault::usage, "--resume --out {}: there is no {}; expected the folder of a run", path, name);
  }
  RunFolder folder;
  folder.path_ = path;
  folder.open_metrics();
  return folder;
}

void RunFolder::open_metrics() {
  metrics_.open(fs::path(path_) / "metrics.jsonl", std::ios::app);
  if (!metrics_) fail(Fault::io, "--out {}: cannot be written: {}", path_, std::strerror(errno));
}

void RunFolder::write(const std::string& name, const Json& content) const { write_text(name, content.dump(2) + '\n'); }

void RunFolder::write_text(const std::string& name, const std::string& content) const {
  const fs::path target = fs::path(path_) / name, draft = fs::path(path_) / ("." + name + ".part");
  {
    std::ofstream file(draft);
    file << content;
    file.close();
    if (!file) {
      const int reason = errno;
      std::error_code ignored;
      fs::remove(draft, ignored);
      fail(Fault::io, "{}: writing failed: {}", draft.string(), std::strerror(reason));
    }
  }
  std::error_code error;
  fs::rename(draft, target, error);
  if (error) fail(Fault::io, "{}: cannot be replaced: {}", target.string(), error.message());
}

Json RunFolder::read(const std::string& name) const {
  const fs::path file = fs::path(path_) / name;
  std::ifstream in(file);
  if (!in) fail(Fault::io, "{}: cannot be read: {}", file.string(), std::strerror(errno));
  Json content = Json::parse(in, nullptr, false);
  if (!content.is_object()) fail(Fault::data, "{}: expected a JSON object, found something else or a torn file", file.string());
  return content;
}

void RunFolder::keep_metrics(const std::function<bool(const Json& point)>& keep) {
  const fs::path file = fs::path(path_) / "metrics.jsonl";
  std::ifstream in(file);
  if (!in) fail(Fault::io, "{}: cannot be read: {}", file.string(), std::strerror(errno));
  std::string kept, line;
  for (int64_t number = 1; std::getline(in, line); ++number) {
    const Json point = Json::parse(line, nullptr, false);
    if (point.is_object() && keep(point)) kept += line + '\n';
    if (!point.is_object() && in.peek() != std::ifstream::traits_type::eof())
      fail(Fault::data, "{}:{}: expected a JSON object, found something else", file.string(), number);
  }
  metrics_.close();
  write_text("metrics.jsonl", kept);
  open_metrics();
}

void RunFolder::append_metric(const Json& point) {
  metrics_ << point.dump() << std::endl;
  if (!metrics_) fail(Fault::io, "{}/metrics.jsonl: writing failed: {}", path_, std::strerror(errno));
}

}  // namespace weft
