// The experiment: every configuration with every seed, all alike, into one run folder.
#pragma once
#include "data/corpus.h"
#include "train/recipe.h"
#include "train/run_folder.h"

namespace weft {

class Experiment {
 public:
  // Opens and checks the data. Throws Fault::config, Fault::data or Fault::io.
  explicit Experiment(Recipe recipe);
  std::string plan() const;  // what run() would do, for people
  // Trains everything. results.json is replaced after every run, so nothing that is done is lost; it says "interrupted"
  // when a stop was requested and "failed" when a run threw.
  void run(const std::string& out);
  // Continues what is in `out`: complete runs are kept, the others trained from their start, as if nothing had happened.
  // Throws Fault::config naming the first setting that is not what it was.
  void resume(const std::string& out);

 private:
  // Trains what is not among the finished runs.
  void train(RunFolder& folder, Json setup, const std::vector<Json>& finished);
  Json setup() const;

  Recipe recipe_;
  Corpus corpus_;
  Split split_;
};

}  // namespace weft
