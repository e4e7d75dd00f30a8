// From a corpus to batches. A protocol says which windows of the text train and which validate; a batch is a pure
// function of (seed, step), so a run can resume anywhere and every configuration of a seed sees the same batches.
// Used by the trainer and the evaluation.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <string_view>
#include <thread>
#include <vector>

#include "data/corpus.h"
#include "data/permutation.h"

namespace weft {

enum class Protocol {
  seed,    // the published recipe: every window with stride 1, nine tenths of them, drawn at random, for training
  strict,  // whole documents held out, windows that do not overlap
};

// "seed" or "strict"; Fault::usage for anything else.
Protocol protocol_from(std::string_view name);
std::string_view name_of(Protocol protocol);

// How many of a corpus's tokens the protocol uses at most; 0: all. For Corpus::open.
constexpr int64_t token_limit(Protocol protocol) { return protocol == Protocol::seed ? 2'000'000 : 0; }

// Text of a corpus, [from, to).
struct Span {
  int64_t from, to;
};

// The windows of one side of a split. The side's text is its spans one after the other; window w is the seq + 1 tokens
// from w * stride on, for w below `of`. The side has those at places [first, first + count) of a random order of them.
struct Windows {
  std::vector<Span> spans;
  std::vector<int64_t> ends;  // ends[i]: tokens in spans[0..i]
  int64_t stride = 0, of = 0, first = 0, count = 0;

  int64_t tokens() const { return ends.empty() ? 0 : ends.back(); }
};

struct Split {
  Windows train, validation;
  bool overlaps = false;           // the same text is in both: validation measures memory too
  int64_t held_out_documents = 0;  // strict only
};

// A pure function of its arguments, and not of a run's seed, so that all runs validate on the same windows.
// Fault::data if the corpus is too short for a window on each side, or has no two documents to part.
Split split_windows(const Corpus& corpus, Protocol protocol, int64_t seq);

struct Batch {
  std::vector<int32_t> tokens, targets;  // [B, T]; a target is the token that follows
  int64_t batch = 0, seq = 0;
};

class Loader {
 public:
  // Fault::data if either side has fewer windows than one batch.
  Loader(Corpus corpus, Protocol protocol, int64_t batch, int64_t seq, uint64_t seed);

  // Training batch of a step, for any step: windows come in a new random order each epoch, every window once; a batch
  // may hold the end of one epoch and the beginning of the next.
  Batch train(int64_t step) const;
  // Validation batch i < validation_batches(), in a random order that is always the same. The windows left over after
  // the last full batch are not used.
  Batch validation(int64_t i) const;

  int64_t train_batches() const { return split_.train.count / batch_; }  // full ones, per epoch
  int64_t validation_batches() const { return split_.validation.count / batch_; }
  const Corpus& corpus() const { return corpus_; }
  const Split& split() const { return split_; }

 private:
  Batch batch_of(const Windows& windows, const std::vector<int64_t>& places) const;

  Corpus corpus_;
  Split split_;
  int64_t batch_, seq_;
  uint64_t seed_;
};

// Makes batches first, first + 1, ... on a thread of its own, at most `depth` ahead. What `make` throws comes out of
// the next() that asks for that batch, and of every later one. Destruction waits only for the batch in the making.
class Prefetcher {
 public:
  Prefetcher(std::function<Batch(int64_t)> make, int64_t first, int64_t depth = 2);
  Batch next();

 private:
  void work(std::stop_token stop, int64_t step);

  std::function<Batch(int64_t)> make_;
  int64_t depth_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::deque<Batch> ready_;
  std::exception_ptr failure_;
  std::jthread thread_;  // last: it stops before what it uses goes
};

}  // namespace weft
