// The corpus used when no data is given: documents in a seeded stochastic language, made so that a model has three
// things to learn, one after the other: word frequencies, a document's topic, and copying from earlier in the document,
// which only attention can do. Its entropy is known, so a loss can be judged. Used by Corpus.
//
// The language. Id 0 starts a document, id 1 is the copy mark, ids 2.. are words; word r = id - 2 is the r-th most
// frequent. A document draws one of K topics, and each of its words comes from the common Zipf law, or (topic_share of
// the time) from the topic's own: topic k has the words with r % K == k. After a document's first 32 words each step
// may also end the document or write the copy mark. After the mark the text repeats itself from a place drawn among the
// last `reach` tokens before the mark, token by token, until a coin says stop; then words come from the topic again.
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

namespace weft {

struct SyntheticOptions {
  int64_t vocab_size = 2048;
  int64_t tokens = 1'000'000;
  uint64_t seed = 0;
  int64_t topics = 8;
  double topic_share = 0.6;       // of a document's own words, those from its topic
  int64_t document_length = 400;  // mean number of steps, not counting copied tokens
  double copy_rate = 0.04;        // copy marks per step
  int64_t copy_length = 24;       // mean tokens copied after a mark
  int64_t reach = 128;            // how far before the mark a copy may begin
};

// Nats per token, measured on the text's first `tokens` tokens.
struct Entropy {
  // The loss of a reader who knows the language and is also told each document's topic and each copy's place and end.
  // Its expectation is a lower bound of the entropy: knowing more cannot make text less predictable.
  double lower = std::numeric_limits<double>::quiet_NaN();
  // The loss of the reader who knows the language and sees the text alone, hidden state summed out exactly. Its
  // expectation is the entropy, so no model that reads only the text does better than this, but for chance. A model
  // that reads windows sees less of a document than this reader, so its own limit is a little higher.
  double upper = std::numeric_limits<double>::quiet_NaN();
  // The standard error of `upper` as an estimate of the entropy, over documents.
  double error = std::numeric_limits<double>::quiet_NaN();
  int64_t tokens = 0;
};

struct SyntheticText {
  std::vector<int32_t> tokens;
  Entropy entropy;
};

// A pure function of the options. Fault::config if they make no language.
SyntheticText generate_text(const SyntheticOptions& options);

}  // namespace weft
