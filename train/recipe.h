// How to train: everything of an experiment that is not the model's shape. Presets and the fields that --set and
// --print-config know are tables in recipe.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "data/loader.h"
#include "engine/device.h"
#include "model/attention.h"
#include "train/run_folder.h"

namespace weft {

struct Recipe {
  std::string preset;
  std::vector<std::string> configs = {"baseline", "lora", "enhanced"};
  std::vector<uint64_t> seeds = {42};
  std::vector<std::string> data;   // token files or folders of them; none: the built-in corpus
  Protocol protocol = Protocol::seed;
  Device device = Device::cpu;
  DType precision = DType::f32;    // of activations and matrix products; weights and optimizer state are f32
  bool muon = true;                // for matrices; AdamW has the rest, or all
  int64_t steps = 100;             // micro-batches
  int64_t batch = 16, seq = 512;   // of a micro-batch
  int64_t accumulate = 4;          // micro-batches an optimizer step
  int64_t eval_every = 20;         // micro-batches
  int64_t eval_batches = 100;
  int64_t max_tokens = -1;         // of the data that are used; 0: all, -1: what the protocol says
  double muon_lr = 0.01, momentum = 0.95, adamw_lr = 0.001, weight_decay = 0.1, clip_norm = 1.0;
  double memory_limit_gb = 0;      // 0: none
  bool graphs = true;              // on a GPU, steps are captured as CUDA graphs; the results are the same
  bool memory_report = false;      // of each run's peak and of an optimizer step, in the run folder

  Config model;                    // what all configurations share
  Overrides overrides;             // fields of the model that --set wrote: they have the last word

  Config config(const std::string& name) const { return with_attention(model, name, overrides); }
  int64_t optimizer_steps() const { return (steps + accumulate - 1) / accumulate; }
};

std::string preset_list();  // "exp1, quick, tiny"
// The preset's recipe for a device; exp1 on a GPU computes in bf16. Fault::usage with the presets there are.
Recipe make_recipe(const std::string& preset, Device device);

// Writes a field of the recipe or of the model from text; Fault::config for an unknown key, naming the nearest.
void set_field(Recipe& recipe, const std::string& key, const std::string& text);

// Throws Fault::config with everything that does not hold together, of the recipe and of each configuration, at once.
void validate(const Recipe& recipe);

// Every field of the recipe and of each configuration's model.
Json resolved_config(const Recipe& recipe);

}  // namespace weft
