#include "data/synthetic.h"

#include <algorithm>
#include <cmath>

#include "engine/check.h"
#include "engine/random.h"

namespace weft {
namespace {

constexpr int32_t kDocument = 0, kCopyMark = 1, kFirstWord = 2;
constexpr int64_t kOpening = 33;         // positions of a document that hold its start and 32 plain words
constexpr int64_t kMeasured = 1 << 20;   // tokens whose entropy is measured
constexpr int64_t kMaxTokens = 1 << 30;  // 4 GiB of memory

// Draws index i with probability p[i] in constant time (Walker's alias method).
class AliasTable {
 public:
  explicit AliasTable(const std::vector<double>& p) : slots_(p.size()) {
    const auto n = static_cast<double>(p.size());
    std::vector<double> share(p.size());
    std::vector<uint32_t> poor, rich;
    for (size_t i = 0; i < p.size(); ++i) {
      share[i] = p[i] * n;
      slots_[i] = {1.0f, static_cast<uint32_t>(i)};
      (share[i] < 1 ? poor : rich).push_back(static_cast<uint32_t>(i));
    }
    while (!poor.empty() && !rich.empty()) {
      const uint32_t low = poor.back(), high = rich.back();
      poor.pop_back();
      slots_[low] = {static_cast<float>(share[low]), high};
      share[high] -= 1 - share[low];
      if (share[high] < 1) {
        rich.pop_back();
        poor.push_back(high);
      }
    }
  }
  int64_t operator()(uint32_t which, uint32_t coin) const {
    const uint64_t i = (uint64_t{which} * slots_.size()) >> 32;
    return to_uniform(coin) < slots_[i].keep ? static_cast<int64_t>(i) : slots_[i].other;
  }

 private:
  struct Slot {
    float keep;
    uint32_t other;
  };
  std::vector<Slot> slots_;
};

std::vector<double> zipf(int64_t n) {
  std::vector<double> p(static_cast<size_t>(n));
  double sum = 0;
  for (int64_t r = 0; r < n; ++r) sum += p[r] = 1 / (static_cast<double>(r) + 2.7);
  for (double& x : p) x /= sum;
  return p;
}

// The probabilities of one step, known to the writer and to both readers.
struct Language {
  explicit Language(const SyntheticOptions& o)
      : topics(o.topics),
        topic_words((o.vocab_size - kFirstWord) / o.topics),
        reach(o.reach),
        topic_share(o.topic_share),
        end(1.0 / static_cast<double>(o.document_length - kOpening + 1)),
        mark(o.copy_rate),
        stop(1.0 / static_cast<double>(o.copy_length)),
        common(zipf(o.vocab_size - kFirstWord)),
        own(zipf(topic_words)) {}

  // Probability that a step at `position` of a document on `topic` writes `id`, when it copies nothing.
  double step(int32_t id, int64_t topic, int64_t position) const {
    const bool opening = position < kOpening;
    if (id == kDocument) return opening ? 0 : end;
    if (id == kCopyMark) return opening ? 0 : mark;
    const int64_t word = id - kFirstWord;
    double p = (1 - topic_share) * common[word];
    if (word % topics == topic && word / topics < topic_words) p += topic_share * own[word / topics];
    return opening ? p : p * (1 - end - mark);
  }
  // Where a copy may begin, as positions of the document: [first, mark).
  int64_t first_source(int64_t mark_position) const { return std::max<int64_t>(1, mark_position - reach); }

  int64_t topics, topic_words, reach;
  double topic_share, end, mark, stop;
  std::vector<double> common, own;
};

// The reader who sees only the text. It holds the joint probability of all that is hidden, given the text so far: for
// every topic, that the last token was a plain step, that it was a true copy mark, or that a copy is under way whose
// next source is at some position. A copy whose source differs from the text is over, so few stay alive.
class Reader {
 public:
  explicit Reader(const Language& language)
      : language_(language), plain_(language.topics), marked_(language.topics), free_(language.topics) {}

  // -log of the probability that the reader gave to the next token.
  double read(int32_t id) {
    const int64_t topics = language_.topics, position = static_cast<int64_t>(document_.size());
    if (position == 0) {  // the corpus begins with a document for certain
      start_document();
      return 0;
    }
    // Every hypothesis but `marked` may take a plain step: a copy does so when its coin says stop.
    for (int64_t k = 0; k < topics; ++k) free_[k] = plain_[k];
    next_.clear();
    for (const Copy& copy : copies_) {
      for (int64_t k = 0; k < topics; ++k) free_[k] += language_.stop * weights_[copy.row + k];
    }
    next_weights_.clear();
    for (const Copy& copy : copies_) {
      if (document_[copy.source] == id) follow(copy.source + 1, &weights_[copy.row], 1 - language_.stop);
    }
    if (may_be_marked_) {
      const int64_t mark = position - 1, first = language_.first_source(mark);
      for (int64_t source = first; source < mark; ++source) {
        if (document_[source] == id) follow(source + 1, marked_.data(), 1.0 / static_cast<double>(mark - first));
      }
    }
    may_be_marked_ = id == kCopyMark;
    double total = 0;
    for (int64_t k = 0; k < topics; ++k) {
      const double p = free_[k] * language_.step(id, k, position);
      plain_[k] = may_be_marked_ ? 0 : p;
      marked_[k] = may_be_marked_ ? p : 0;
      total += p;
    }
    for (const double w : next_weights_) total += w;
    check(total > 0, "the synthetic language must allow its own text, found id {} at position {}", id, position);
    copies_.swap(next_);
    weights_.swap(next_weights_);
    if (id == kDocument) {
      start_document();
    } else {
      document_.push_back(id);
      for (double& w : plain_) w /= total;
      for (double& w : marked_) w /= total;
      for (double& w : weights_) w /= total;
    }
    return -std::log(total);
  }

 private:
  struct Copy {
    int64_t source;  // position in the document
    size_t row;      // its weights by topic: weights_[row .. row + topics)
  };

  void follow(int64_t source, const double* weights, double scale) {
    next_.push_back({source, next_weights_.size()});
    for (int64_t k = 0; k < language_.topics; ++k) next_weights_.push_back(scale * weights[k]);
  }
  void start_document() {
    document_.assign(1, kDocument);
    copies_.clear();
    weights_.clear();
    may_be_marked_ = false;
    std::fill(plain_.begin(), plain_.end(), 1.0 / static_cast<double>(language_.topics));
  }

  const Language& language_;
  std::vector<int32_t> document_;
  std::vector<double> plain_, marked_, free_;
  bool may_be_marked_ = false;
  std::vector<Copy> copies_, next_;
  std::vector<double> weights_, next_weights_;
};

// Sums losses, and their spread from document to document.
class Measure {
 public:
  void add(bool starts_document, double loss) {
    if (starts_document) close_document();
    ++tokens_, ++document_tokens_;
    document_ += loss;
  }
  void finish(Entropy& entropy) {
    close_document();
    const double n = tokens_, mean = loss_ / n;
    entropy.upper = mean;
    // The variance of a ratio of sums: document by document, loss - mean * tokens.
    const double spread = loss2_ - 2 * mean * cross_ + mean * mean * tokens2_;
    if (documents_ > 1) entropy.error = std::sqrt(std::max(0.0, spread) * documents_ / (documents_ - 1)) / n;
  }

 private:
  void close_document() {
    if (document_tokens_ == 0) return;
    ++documents_;
    loss_ += document_, loss2_ += document_ * document_, cross_ += document_ * document_tokens_;
    tokens2_ += document_tokens_ * document_tokens_;
    document_ = document_tokens_ = 0;
  }
  double tokens_ = 0, documents_ = 0, document_tokens_ = 0, document_ = 0;
  double loss_ = 0, loss2_ = 0, cross_ = 0, tokens2_ = 0;
};

void validate(const SyntheticOptions& o) {
  const auto within = [](const char* what, auto value, auto low, auto high) {
    if (!(value >= low && value <= high)) {
      fail(Fault::config, "synthetic corpus: {} must be {} to {}, found {}", what, low, high, value);
    }
  };
  within("topics", o.topics, 1, 1024);
  within("vocab_size", o.vocab_size, kFirstWord + 2 * o.topics, int64_t{1} << 24);
  within("tokens", o.tokens, 2, kMaxTokens);
  within("topic_share", o.topic_share, 0.0, 0.95);
  within("document_length", o.document_length, 2 * kOpening, 1'000'000);
  within("copy_rate", o.copy_rate, 0.0, 0.5);
  within("copy_length", o.copy_length, 1, 100'000);
  within("reach", o.reach, 1, 100'000);
}

}  // namespace

SyntheticText generate_text(const SyntheticOptions& options) {
  validate(options);
  const Language language(options);
  const AliasTable common(language.common), own(language.own);
  const RngKey key{options.seed, stream_of("synthetic corpus")};
  const RngKey topic_key{options.seed, stream_of("synthetic topic")};
  // One 32-bit draw decides what a step does; thresholds in the order end, mark, topic word, common word.
  const auto threshold = [](double p) { return static_cast<uint64_t>(p * 4294967296.0); };
  const uint64_t end = threshold(language.end), mark = threshold(language.end + language.mark);
  const double topical = (1 - language.end - language.mark) * language.topic_share;
  const uint64_t own_word = threshold(language.end + language.mark + topical);
  const uint64_t own_word_opening = threshold(language.topic_share), stop = threshold(language.stop);

  SyntheticText text;
  text.tokens.resize(static_cast<size_t>(options.tokens));
  int32_t* out = text.tokens.data();
  const int64_t measured = std::min(options.tokens, kMeasured);
  Reader reader(language);
  Measure measure;
  double told = 0;

  int64_t start = 0, topic = 0, source = -1;  // source: position in the text of the next token to copy, or -1
  for (int64_t t = 0; t < options.tokens; ++t) {
    const int64_t position = t - start;
    const Philox4 r = philox(key, static_cast<uint64_t>(t));
    const bool after_mark = t > 0 && source == -1 && out[t - 1] == kCopyMark;
    const int64_t first = after_mark ? start + language.first_source(position - 1) : 0;
    const int64_t told_source = source;
    int32_t id;
    if (t == 0) {
      id = kDocument;
    } else if (after_mark) {
      source = first + static_cast<int64_t>((uint64_t{r.v[0]} * static_cast<uint64_t>(t - 1 - first)) >> 32);
      id = out[source++];
    } else if (source != -1 && r.v[3] >= stop) {
      id = out[source++];
    } else {
      source = -1;
      const bool opening = position < kOpening;
      if (!opening && r.v[0] < end) {
        id = kDocument;
      } else if (!opening && r.v[0] < mark) {
        id = kCopyMark;
      } else if (r.v[0] < (opening ? own_word_opening : own_word)) {
        id = static_cast<int32_t>(kFirstWord + own(r.v[1], r.v[2]) * language.topics + topic);
      } else {
        id = static_cast<int32_t>(kFirstWord + common(r.v[1], r.v[2]));
      }
    }
    out[t] = id;
    if (t < measured) {
      double p = 1;
      if (after_mark) {
        p = static_cast<double>(std::count(out + first, out + t - 1, id)) / static_cast<double>(t - 1 - first);
      } else if (told_source != -1) {
        p = language.stop * language.step(id, topic, position) + (out[told_source] == id ? 1 - language.stop : 0);
      } else if (t > 0) {
        p = language.step(id, topic, position);
      }
      told -= std::log(p);
      measure.add(id == kDocument, reader.read(id));
    }
    if (id == kDocument) {
      start = t;
      source = -1;
      topic = static_cast<int64_t>(
          random_below(topic_key, static_cast<uint64_t>(t), static_cast<uint64_t>(language.topics)));
    }
  }
  text.entropy.tokens = measured;
  text.entropy.lower = told / static_cast<double>(measured);
  measure.finish(text.entropy);
  return text;
}

}  // namespace weft
