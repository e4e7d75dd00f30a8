// What a run folder of train_exp1 holds, as the report reads it: results.json, metrics.jsonl and the memory
// timelines, checked field by field.
// A complaint names the file and the field; nothing in these files is trusted, and nothing else is read.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace weft {

struct Setup {
  std::string protocol, preset, device, device_name, precision, optimizer, data, commit;
  std::optional<int64_t> tokens, vocab_size, batch, seq, grad_accum, micro_steps, optimizer_steps, train_windows,
      val_windows;
  std::optional<double> entropy_lower, entropy_upper;  // nats per token
  bool windows_overlap = false;
  std::vector<std::string> configs;
  std::vector<int64_t> seeds;
};

using Value = std::optional<double>;
using Parts = std::vector<std::pair<std::string, double>>;  // in a fixed order of names

struct Run {
  std::string experiment;
  int64_t seed = 0;
  bool complete = false;
  std::string status;
  Value val_loss, val_accuracy, val_perplexity, train_loss, training_time_minutes, initial_memory_gb, peak_memory_gb,
      final_memory_gb, memory_used_gb, parameter_count, active_parameter_count, flops_per_token,
      kv_cache_bytes_per_token, tokens_per_second, step_ms_median, mfu;
  Parts peak_by_category;    // 1e9 bytes
  Parts parameters_by_part;
  std::vector<std::vector<double>> expert_load;  // [layer][expert], fractions
};

struct Point {
  int64_t micro_step = 0;
  Value tokens, seconds, loss, accuracy, grad_norm, lr, memory_gb;
};
struct Curves {
  std::vector<Point> train, eval;  // by micro-step, each once
};

struct Timeline {
  int64_t seed = 0;
  std::vector<double> allocated_gb;  // after each allocation and release of one optimizer step, in order
};

struct Results {
  std::filesystem::path folder;
  std::string status;
  Setup setup;
  std::vector<Run> runs;                                       // at most one per configuration and seed
  std::map<std::pair<std::string, int64_t>, Curves> curves;    // by configuration and seed
  std::map<std::string, Timeline> timelines;                   // by configuration: of its first seed that has one
  std::vector<std::string> remarks;                            // what was skipped while reading

  const Run* find(const std::string& experiment, int64_t seed) const;  // null when missing
};

// Throws Error: Fault::io when there is nothing to read, Fault::data when it is not what train_exp1 writes.
Results read_results(const std::filesystem::path& folder);

int64_t complete_runs(const Results& r);
int64_t wanted_runs(const Results& r);  // of its configurations and seeds

}  // namespace weft
