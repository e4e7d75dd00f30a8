#include "tools/report/results.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <sstream>

#include "engine/check.h"

namespace weft {
namespace {

using nlohmann::json;
constexpr const char* kSchema = "weft-results-1";
constexpr double kLargest = 1e30;  // beyond any measurement, and squares of it still add up
constexpr const char* kCategories[] = {"parameter", "gradient", "optimizer", "activation", "workspace", "data"};
constexpr const char* kModelParts[] = {"embedding", "attention", "experts", "router", "norms"};

std::string kind_of(const json& value) {
  if (value.is_string()) return fmt::format("the text \"{}\"", value.get<std::string>().substr(0, 60));
  if (value.is_number() || value.is_boolean() || value.is_null()) return value.dump();
  return value.is_array() ? "an array" : "an object";
}

[[noreturn]] void wrong(const std::string& where, const char* wanted, const json& found) {
  fail(Fault::data, "{}: expected {}, found {}", where, wanted, kind_of(found));
}

double number(const json& value, const std::string& where) {
  if (!value.is_number()) wrong(where, "a number", value);
  const double x = value.get<double>();
  if (!(std::abs(x) <= kLargest)) wrong(where, "a number of at most 1e30", value);
  return x;
}

int64_t integer(const json& value, const std::string& where) {
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<uint64_t>() <= uint64_t(std::numeric_limits<int64_t>::max()));
  if (!fits) wrong(where, "an integer", value);
  return value.get<int64_t>();
}

std::string text(const json& value, const std::string& where) {
  if (!value.is_string()) wrong(where, "text", value);
  return value.get<std::string>();
}

const json& array(const json& value, const std::string& where) {
  if (!value.is_array()) wrong(where, "an array", value);
  return value;
}

// A JSON object and where it lies ("results.json: runs[2]"). A missing key and null mean the same.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) wrong(where_, "an object", object);
  }
  std::string place(const char* key) const { return where_ + (where_.ends_with(": ") ? "" : ".") + key; }
  const json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  const json& need(const char* key) const {
    const json* value = find(key);
    if (!value) fail(Fault::data, "{}: expected a value, found none", place(key));
    return *value;
  }
  std::string need_text(const char* key) const { return text(need(key), place(key)); }
  int64_t need_integer(const char* key) const { return integer(need(key), place(key)); }
  std::string maybe_text(const char* key) const { return find(key) ? need_text(key) : ""; }
  bool maybe_flag(const char* key) const {
    const json* value = find(key);
    if (value && !value->is_boolean()) wrong(place(key), "true or false", *value);
    return value && value->get<bool>();
  }
  Value maybe_number(const char* key) const {
    const json* value = find(key);
    return value ? Value(number(*value, place(key))) : Value();
  }
  Value maybe_amount(const char* key) const {
    const Value value = maybe_number(key);
    if (value && *value < 0) wrong(place(key), "a number that is not negative", *find(key));
    return value;
  }
  std::optional<int64_t> maybe_count(const char* key) const {
    const json* value = find(key);
    if (!value) return {};
    const int64_t n = integer(*value, place(key));
    if (n < 0) wrong(place(key), "a count", *value);
    return n;
  }

 private:
  const json& object_;
  std::string where_;
};

std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  try {
    if (in) return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  } catch (const std::ios_base::failure&) {  // how libstdc++ reports a folder or a failing disk here
  }
  fail(Fault::io, "{}: cannot be read", path.string());
}

template <class T>
void add_once(std::vector<T>& list, const T& value) {
  if (std::find(list.begin(), list.end(), value) == list.end()) list.push_back(value);
}

Setup read_setup(const Fields& in) {
  Setup s;
  s.protocol = in.need_text("protocol");
  if (s.protocol != "seed" && s.protocol != "strict")
    wrong(in.place("protocol"), "\"seed\" or \"strict\"", in.need("protocol"));
  s.preset = in.maybe_text("preset");
  s.device = in.maybe_text("device");
  s.device_name = in.maybe_text("device_name");
  s.precision = in.maybe_text("precision");
  s.optimizer = in.maybe_text("optimizer");
  s.data = in.maybe_text("data");
  s.commit = in.maybe_text("commit");
  s.tokens = in.maybe_count("tokens");
  s.vocab_size = in.maybe_count("vocab_size");
  s.batch = in.maybe_count("batch");
  s.seq = in.maybe_count("seq");
  s.grad_accum = in.maybe_count("grad_accum");
  s.micro_steps = in.maybe_count("micro_steps");
  s.optimizer_steps = in.maybe_count("optimizer_steps");
  s.train_windows = in.maybe_count("train_windows");
  s.val_windows = in.maybe_count("val_windows");
  s.entropy_lower = in.maybe_number("entropy_lower");
  s.entropy_upper = in.maybe_number("entropy_upper");
  s.windows_overlap = in.maybe_flag("windows_overlap") || s.protocol == "seed";
  for (const json& name : array(in.need("configs"), in.place("configs")))
    add_once(s.configs, text(name, in.place("configs")));
  for (const json& seed : array(in.need("seeds"), in.place("seeds")))
    add_once(s.seeds, integer(seed, in.place("seeds")));
  return s;
}

Parts read_parts(const Fields& in, const char* key, std::span<const char* const> names) {
  Parts parts;
  if (const json* object = in.find(key)) {
    const Fields amounts(*object, in.place(key));
    for (const char* name : names)
      if (const Value amount = amounts.maybe_amount(name)) parts.emplace_back(name, *amount);
  }
  return parts;
}

Run read_run(const Fields& in) {
  Run r;
  r.experiment = in.need_text("experiment_name");
  r.seed = in.need_integer("seed");
  r.status = in.need_text("status");
  r.complete = r.status == "complete";
  r.val_loss = in.maybe_number("val_loss");
  r.val_accuracy = in.maybe_amount("val_accuracy");
  r.val_perplexity = in.maybe_amount("val_perplexity");
  r.train_loss = in.maybe_number("train_loss");
  r.training_time_minutes = in.maybe_amount("training_time_minutes");
  r.initial_memory_gb = in.maybe_amount("initial_memory_gb");
  r.peak_memory_gb = in.maybe_amount("peak_memory_gb");
  r.final_memory_gb = in.maybe_amount("final_memory_gb");
  r.memory_used_gb = in.maybe_number("memory_used_gb");
  r.parameter_count = in.maybe_amount("parameter_count");
  r.active_parameter_count = in.maybe_amount("active_parameter_count");
  r.flops_per_token = in.maybe_amount("flops_per_token");
  r.kv_cache_bytes_per_token = in.maybe_amount("kv_cache_bytes_per_token");
  r.tokens_per_second = in.maybe_amount("tokens_per_second");
  r.step_ms_median = in.maybe_amount("step_ms_median");
  r.mfu = in.maybe_amount("mfu");
  // Parameters are shown in millions from their exact count; the rounded figure serves where the count is absent.
  if (const Value millions = in.maybe_amount("parameters_millions"); millions && !r.parameter_count)
    r.parameter_count = *millions * 1e6;
  r.peak_by_category = read_parts(in, "peak_memory_by_category_gb", kCategories);
  r.parameters_by_part = read_parts(in, "parameters_by_part", kModelParts);
  if (const json* load = in.find("expert_load"))
    for (const json& layer : array(*load, in.place("expert_load"))) {
      std::vector<double>& fractions = r.expert_load.emplace_back();
      for (const json& fraction : array(layer, in.place("expert_load")))
        fractions.push_back(number(fraction, in.place("expert_load")));
      if (fractions.empty() || fractions.size() != r.expert_load[0].size())
        fail(Fault::data, "{}: expected as many experts in every layer, found {} and {}", in.place("expert_load"),
             r.expert_load[0].size(), fractions.size());
    }
  return r;
}

void read_metrics(const std::filesystem::path& path, Results& results) {
  if (!std::filesystem::exists(path)) {
    results.remarks.push_back("There is no metrics.jsonl, hence no curves.");
    return;
  }
  const std::string content = read_file(path);
  std::map<std::pair<std::string, int64_t>, std::pair<std::map<int64_t, Point>, std::map<int64_t, Point>>> seen;
  int64_t line_number = 0;
  for (size_t begin = 0; begin < content.size();) {
    ++line_number;
    const size_t end = std::min(content.find('\n', begin), content.size());
    const std::string line = content.substr(begin, end - begin);
    const bool last = end == content.size();
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const json value = json::parse(line, nullptr, false);
    const std::string where = fmt::format("{}:{}", path.string(), line_number);
    if (value.is_discarded() && last) {
      results.remarks.push_back(fmt::format("The last line of metrics.jsonl (line {}) is torn and was left out.", line_number));
      break;
    }
    if (value.is_discarded()) fail(Fault::data, "{}: expected a JSON object, found a line that is not JSON", where);
    const Fields in(value, where + ": ");
    const std::string kind = in.need_text("kind");
    if (kind != "train" && kind != "eval") continue;
    Point point;
    point.micro_step = in.need_integer("micro_step");
    point.tokens = in.maybe_amount("tokens");
    point.seconds = in.maybe_amount("seconds");
    point.loss = in.maybe_number(kind == "train" ? "loss" : "val_loss");
    point.accuracy = in.maybe_amount("val_accuracy");
    point.grad_norm = in.maybe_amount("grad_norm");
    point.lr = in.maybe_amount("lr");
    point.memory_gb = in.maybe_amount("memory_gb");
    auto& [train, eval] = seen[{in.need_text("experiment_name"), in.need_integer("seed")}];
    // A continued run writes again what the interrupted one wrote: the later line stands.
    if (point.loss) (kind == "train" ? train : eval)[point.micro_step] = point;
  }
  for (const auto& [run, points] : seen) {
    Curves& curves = results.curves[run];
    for (const auto& entry : points.first) curves.train.push_back(entry.second);
    for (const auto& entry : points.second) curves.eval.push_back(entry.second);
  }
}

// memory_timeline_<config>_<seed>.csv, whose last column is the allocator's total in bytes.
std::vector<double> read_timeline(const std::filesystem::path& path) {
  std::istringstream in(read_file(path));
  std::string line;
  std::getline(in, line);
  if (line != "sequence,bytes,category,layer,allocated")
    fail(Fault::data, "{}:1: expected sequence,bytes,category,layer,allocated, found another head", path.string());
  std::vector<double> gigabytes;
  for (int64_t number = 2; std::getline(in, line); ++number) {
    const char* begin = line.data() + line.rfind(',') + 1;  // a layer's name may hold commas, and comes before
    const char* end = line.data() + line.size();
    int64_t bytes = -1;
    if (std::from_chars(begin, end, bytes).ptr != end || bytes < 0)
      fail(Fault::data, "{}:{}: allocated: expected a count of bytes, found something else", path.string(), number);
    gigabytes.push_back(static_cast<double>(bytes) / 1e9);
  }
  return gigabytes;
}

void read_timelines(const std::filesystem::path& folder, Results& results) {
  for (const std::string& config : results.setup.configs) {
    if (config.find('/') != std::string::npos) continue;  // no name of train_exp1's, and a way out of the folder
    for (const int64_t seed : results.setup.seeds) {
      const std::filesystem::path path = folder / fmt::format("memory_timeline_{}_{}.csv", config, seed);
      std::error_code error;
      if (!std::filesystem::is_regular_file(path, error)) continue;
      results.timelines[config] = {seed, read_timeline(path)};
      break;
    }
  }
}

}  // namespace

const Run* Results::find(const std::string& experiment, int64_t seed) const {
  for (const Run& run : runs)
    if (run.experiment == experiment && run.seed == seed) return &run;
  return nullptr;
}

Results read_results(const std::filesystem::path& folder) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) fail(Fault::io, "{}: no such folder", folder.string());
  const std::filesystem::path path = folder / "results.json";
  if (!std::filesystem::is_regular_file(path, error))
    fail(Fault::io, "{}: no such file; is {} a run folder of train_exp1?", path.string(), folder.string());

  json document;
  try {
    document = json::parse(read_file(path));
  } catch (const json::parse_error& e) {
    fail(Fault::data, "{}: torn or not JSON at byte {}", path.string(), e.byte);
  } catch (const json::exception& e) {
    fail(Fault::data, "{}: not readable as JSON: {}", path.string(), e.what());
  }
  const Fields in(document, path.string() + ": ");
  const std::string schema = in.find("schema") ? in.need_text("schema") : "none";
  if (schema != kSchema) fail(Fault::data, "{}: expected {}, found {}", in.place("schema"), kSchema, schema);

  Results results;
  results.folder = folder;
  results.status = in.need_text("status");
  results.setup = read_setup(Fields(in.need("setup"), in.place("setup")));
  const json& runs = array(in.need("runs"), in.place("runs"));
  for (size_t i = 0; i < runs.size(); ++i) {
    const std::string where = fmt::format("{}[{}]", in.place("runs"), i);
    Run run = read_run(Fields(runs[i], where));
    if (results.find(run.experiment, run.seed))
      fail(Fault::data, "{}: expected each configuration and seed once, found {} with seed {} again", where,
           run.experiment, run.seed);
    add_once(results.setup.configs, run.experiment);
    add_once(results.setup.seeds, run.seed);
    results.runs.push_back(std::move(run));
  }
  read_metrics(folder / "metrics.jsonl", results);
  read_timelines(folder, results);
  return results;
}

int64_t complete_runs(const Results& r) {
  return std::count_if(r.runs.begin(), r.runs.end(), [](const Run& run) { return run.complete; });
}

int64_t wanted_runs(const Results& r) { return static_cast<int64_t>(r.setup.configs.size() * r.setup.seeds.size()); }

}  // namespace weft
