// The folder of one experiment: resolved_config.json, env.json, metrics.jsonl (a line per training and evaluation
// point, flushed as it is made) and results.json (replaced whole after every run). tools/report reads it.
#pragma once
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

namespace weft {

using Json = nlohmann::ordered_json;

class RunFolder {
 public:
  // Makes the folder. Throws Fault::usage when it already holds something, Fault::io when it cannot be written.
  explicit RunFolder(const std::string& path);
  // Opens a folder that holds a run, to continue it. Throws Fault::usage when it holds none.
  static RunFolder existing(const std::string& path);
  // Replaces a file whole: writes beside it, then renames. Throws Fault::io.
  void write(const std::string& name, const Json& content) const;
  void write_text(const std::string& name, const std::string& content) const;
  Json read(const std::string& name) const;  // throws Fault::io, Fault::data
  // Appends a line to metrics.jsonl. Throws Fault::io.
  void append_metric(const Json& point);
  // Leaves in metrics.jsonl only the points that `keep` wants; a torn last line goes too. Throws Fault::io, Fault::data.
  void keep_metrics(const std::function<bool(const Json& point)>& keep);

 private:
  RunFolder() = default;
  void open_metrics();

  std::string path_;
  std::ofstream metrics_;
};

}  // namespace weft
