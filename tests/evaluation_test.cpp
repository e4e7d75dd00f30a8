// An evaluation in the memory of captured steps: the same numbers, no memory of its own, nothing left behind.
#include "train/evaluation.h"

#include <doctest/doctest.h>

#include "data/synthetic.h"
#include "train/step.h"

using namespace weft;

namespace {

struct Setting {
  explicit Setting(Device device)
      : recipe(make_recipe("tiny", device)),
        loader(Corpus::synthetic({.vocab_size = recipe.model.vocab_size, .tokens = 5000}), recipe.protocol,
               recipe.batch, recipe.seq, 1),
        params(recipe.precision), model(recipe.config("baseline"), Scope(params, device, 3)) {}
  Recipe recipe;
  Loader loader;
  Params params;
  Transformer model;
};

bool same(const Evaluation& a, const Evaluation& b) {
  return a.loss == b.loss && a.accuracy == b.accuracy && a.expert_load == b.expert_load;
}

}  // namespace

TEST_CASE("an evaluation works in a pool's memory and leaves nothing there") {
  const Setting s(Device::cpu);
  const Evaluation expected = evaluate(s.model, s.loader, s.recipe);
  CHECK(expected.loss > 0);
  MemoryPool pool(allocator(Device::cpu));
  CHECK(same(evaluate(s.model, s.loader, s.recipe, &pool), expected));
  CHECK(pool.live_blocks() == 0);
  const int64_t held = allocator(Device::cpu).stats().held;
  CHECK(held > 0);
  CHECK(same(evaluate(s.model, s.loader, s.recipe, &pool), expected));
  CHECK(allocator(Device::cpu).stats().held == held);
}

TEST_SUITE("cuda") {
  TEST_CASE("evaluations between captured steps change nothing and need no memory of their own") {
    std::vector<double> losses[2];
    for (const bool evaluates : {false, true}) {
      Setting s(Device::cuda);
      s.recipe.accumulate = 1;
      TrainingStep step(s.model, s.params, s.recipe, 42);
      int64_t reserved = 0;
      for (int64_t i = 0; i < 6; ++i) {
        step.micro_batch(s.loader.train(i));
        step.update(1);
        losses[evaluates].push_back(step.take().losses[0]);
        if (!evaluates || i < 2) continue;
        CHECK(same(evaluate(s.model, s.loader, s.recipe, step.pool()), evaluate(s.model, s.loader, s.recipe)));
        if (i == 2) reserved = allocator(Device::cuda).stats().reserved;
        CHECK(allocator(Device::cuda).stats().reserved == reserved);
      }
    }
    CHECK(losses[0] == losses[1]);
  }
}
