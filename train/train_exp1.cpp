// train_exp1: trains the three attention configurations alike and writes a run folder that tools/report compares.
#include <CLI/CLI.hpp>
#include <ctime>

#include "model/transformer.h"
#include "train/algorithms.h"
#include "train/experiment.h"
#include "train/stop.h"

namespace weft {
namespace {

constexpr const char* kFooter = R"(
Without --data the built-in corpus is used: a synthetic language whose entropy per token is known.
Examples:
  train_exp1 --data books.bin --protocol seed --preset exp1 --seeds 42,43,44
  train_exp1 --preset quick --configs baseline,lora --set hidden_size=96
  train_exp1 --seeds 42,43,44 --out runs/three --resume    (with the settings it was started with)
Exit codes: 0 done, 1 a bug, 2 command line, 3 configuration, 4 input data, 5 reading or writing, 6 GPU or memory,
7 a loss or gradient that is not finite, 130 stopped by Ctrl-C (what was done is written).)";

// Options that write one field of the recipe or the model; their text goes through set_field, as --set's does.
struct FieldOption {
  const char *option, *key, *help;
};
constexpr FieldOption kFieldOptions[] = {
    {"--configs", "configs", "attention configurations, comma-separated: "},
    {"--seeds", "seeds", "seeds, comma-separated"},
    {"--data", "data", "token files in llm.c's format or tokenize's folder, comma-separated: one corpus"},
    {"--protocol", "protocol", "seed (the published recipe) or strict (held-out documents, true schedule)"},
    {"--optimizer", "optimizer", "muon (matrices; AdamW for the rest) or adamw"},
    {"--precision", "precision", "fp32, or bf16 compute over float32 master weights"},
    {"--steps", "steps", "micro-batches of each run"},
    {"--batch", "batch", "sequences in a micro-batch"},
    {"--seq", "seq", "tokens in a sequence"},
    {"--memory-limit", "memory_limit_gb", "gigabytes of device memory a run may take; 0 for no limit"},
};

int run(int argc, char** argv) {
  CLI::App app{"Trains a Mixture-of-Experts transformer under several attention configurations, all alike."};
  app.footer(kFooter);
  std::string preset, device = "auto", out;
  std::vector<std::string> settings;
  bool count_params = false, print_config = false, dry_run = false, resume = false, memory_report = false;
  app.add_option("--preset", preset, "sizes and recipe: " + preset_list() + " (default: exp1 with a GPU, else quick)")
      ->take_last();
  app.add_option("--device", device, "auto, cpu or cuda")->capture_default_str()->take_last();
  std::vector<std::pair<const FieldOption*, std::string>> fields;
  for (const FieldOption& f : kFieldOptions) fields.push_back({&f, ""});
  for (auto& [f, text] : fields)
    app.add_option(f->option, text, f->help + (f->key == std::string("configs") ? attention_list() : ""))->take_last();
  app.add_option("--set", settings,
                 "key=value, for every field that --print-config shows but preset, device and attention (graphs=0: on a GPU, "
                 "no CUDA graphs); may be repeated");
  app.add_option("--out", out, "folder of the run, new (default: runs/exp1-<time>)")->take_last();
  app.add_flag("--resume", resume, "continue the run in --out: complete runs are kept, the others trained again");
  app.add_flag("--memory-report", memory_report, "write who held the memory at each run's peak, and a step's timeline");
  AlgorithmOptions algorithms;
  algorithms.add_to(app);
  app.add_flag("--count-params", count_params, "print each configuration's parameters and stop");
  app.add_flag("--print-config", print_config, "print the resolved settings as JSON and stop");
  app.add_flag("--dry-run", dry_run, "check the settings and the data, print the plan and stop");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);
    fail(Fault::usage, "{} (see train_exp1 --help)", e.what());
  }
  for (const auto& [option, text] : {std::pair{"--preset", &preset}, std::pair{"--out", &out}})
    if (app.count(option) && text->empty()) fail(Fault::usage, "{}: expected a name, found ''", option);

  if (resume && out.empty()) fail(Fault::usage, "--resume: name the run's folder with --out");
  if (device != "auto" && device != "cpu" && device != "cuda")
    fail(Fault::usage, "--device {}: expected auto, cpu or cuda", device);
  const bool trains = !count_params && !print_config;
  if (device == "cuda" && trains) require_cuda();
  const bool on_gpu = device == "cuda" || (device == "auto" && cuda_available());
  Recipe recipe = make_recipe(!preset.empty() ? preset : on_gpu ? "exp1" : "quick", on_gpu ? Device::cuda : Device::cpu);
  for (const auto& [f, text] : fields)
    if (app.count(f->option)) set_field(recipe, f->key, text);
  for (const std::string& setting : settings) {
    const size_t equals = setting.find('=');
    if (equals == std::string::npos) fail(Fault::usage, "--set {}: expected key=value", setting);
    set_field(recipe, setting.substr(0, equals), setting.substr(equals + 1));
  }
  if (memory_report) recipe.memory_report = true;
  validate(recipe);

  if (count_params) {
    for (const std::string& name : recipe.configs)
      fmt::print("{:<10} {:>12}\n", name, parameter_count(recipe.config(name)));
    return 0;
  }
  if (print_config) {
    fmt::print("{}\n", resolved_config(recipe).dump(2));
    return 0;
  }
  if (!dry_run) algorithms.apply(recipe.device);
  Experiment experiment(recipe);
  if (dry_run) {
    fmt::print("{}", experiment.plan());
    return 0;
  }
  if (out.empty()) {
    char stamp[32];
    const std::time_t now = std::time(nullptr);
    std::strftime(stamp, sizeof stamp, "%Y%m%d-%H%M%S", std::localtime(&now));
    out = fmt::format("runs/exp1-{}", stamp);
  }
  install_stop_signals();
  if (resume)
    experiment.resume(out);
  else
    experiment.run(out);
  return stop_requested() ? 130 : 0;
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) {
  return weft::run_program("train_exp1", [&] { return weft::run(argc, argv); });
}
