#include "data/loader.h"

#include <algorithm>
#include <cstdlib>

#include "engine/check.h"

namespace weft {
namespace {

constexpr RngKey kWindowOrder{0, stream_of("windows")};
constexpr RngKey kDocumentOrder{0, stream_of("held-out documents")};

void add_span(Windows& side, Span span) {
  if (!side.spans.empty() && side.spans.back().to == span.from) {
    side.spans.back().to = span.to;
    side.ends.back() += span.to - span.from;
  } else {
    side.ends.push_back(side.tokens() + span.to - span.from);
    side.spans.push_back(span);
  }
}

// Tokens [from, from + n) of a side's text.
void copy_text(const Corpus& corpus, const Windows& side, int64_t from, int64_t n, int32_t* out) {
  auto i = static_cast<size_t>(std::upper_bound(side.ends.begin(), side.ends.end(), from) - side.ends.begin());
  while (n > 0) {
    const int64_t part = std::min(n, side.ends[i] - from);
    corpus.copy(side.spans[i].to - (side.ends[i] - from), part, out);
    from += part, out += part, n -= part, ++i;
  }
}

// Takes documents in a random order, each if it brings the held-out text nearer to a tenth of the corpus.
std::vector<bool> held_out(const Corpus& corpus) {
  const std::vector<int64_t>& starts = corpus.documents();
  const auto count = static_cast<int64_t>(starts.size());
  if (count < 2) {
    fail(Fault::data,
         "{}: the strict protocol holds out whole documents, so it needs at least 2, found {} "
         "(a document starts at token id {})",
         corpus.description(), count, kDocumentToken);
  }
  const auto length = [&](int64_t d) { return (d + 1 < count ? starts[d + 1] : corpus.size()) - starts[d]; };
  const int64_t wanted = std::max<int64_t>(1, corpus.size() / 10);
  const Permutation order(kDocumentOrder, count);
  std::vector<bool> held(static_cast<size_t>(count));
  int64_t tokens = 0, shortest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = order(i);
    if (length(d) < length(shortest)) shortest = d;
    if (std::abs(tokens + length(d) - wanted) >= std::abs(tokens - wanted)) continue;
    held[d] = true;
    tokens += length(d);
  }
  if (tokens == 0) held[shortest] = true;
  return held;
}

Split split_seed(const Corpus& corpus, int64_t seq) {
  Split split;
  split.overlaps = true;
  add_span(split.train, {0, corpus.size()});
  split.train.stride = 1;
  split.train.of = std::max<int64_t>(0, corpus.size() - seq);
  split.validation = split.train;
  split.validation.count = split.train.of / 10;
  split.train.count = split.train.of - split.validation.count;
  split.validation.first = split.train.count;
  return split;
}

Split split_strict(const Corpus& corpus, int64_t seq) {
  Split split;
  const std::vector<int64_t>& starts = corpus.documents();
  const std::vector<bool> held = held_out(corpus);
  for (size_t d = 0; d < starts.size(); ++d) {
    const int64_t to = d + 1 < starts.size() ? starts[d + 1] : corpus.size();
    add_span(held[d] ? split.validation : split.train, {starts[d], to});
    split.held_out_documents += held[d];
  }
  for (Windows* side : {&split.train, &split.validation}) {
    side->stride = seq;
    side->of = side->count = std::max<int64_t>(0, side->tokens() - 1) / seq;
  }
  return split;
}

}  // namespace

Protocol protocol_from(std::string_view name) {
  for (const Protocol protocol : {Protocol::seed, Protocol::strict}) {
    if (name == name_of(protocol)) return protocol;
  }
  fail(Fault::usage, "unknown protocol {}, expected seed or strict", name);
}

std::string_view name_of(Protocol protocol) { return protocol == Protocol::seed ? "seed" : "strict"; }

Split split_windows(const Corpus& corpus, Protocol protocol, int64_t seq) {
  check(seq > 0, "the sequence length must be positive, found {}", seq);
  Split split = protocol == Protocol::seed ? split_seed(corpus, seq) : split_strict(corpus, seq);
  for (const auto& [side, name] : {std::pair{&split.train, "training"}, {&split.validation, "validation"}}) {
    if (side->count == 0) {
      fail(Fault::data, "{}: too short: no window of {} + 1 tokens is left for {} under the {} protocol",
           corpus.description(), seq, name, name_of(protocol));
    }
  }
  return split;
}

Loader::Loader(Corpus corpus, Protocol protocol, int64_t batch, int64_t seq, uint64_t seed)
    : corpus_(std::move(corpus)), batch_(batch), seq_(seq), seed_(seed) {
  check(batch > 0 && seq > 0, "a batch must have sequences and tokens, found {} x {}", batch, seq);
  if ((corpus_.size() - 1) / seq < batch) {
    fail(Fault::data, "{}: too short: one batch of {} x {} needs {} x {} + 1 tokens", corpus_.description(), batch, seq,
         batch, seq);
  }
  split_ = split_windows(corpus_, protocol, seq);
  for (const auto& [side, name] : {std::pair{&split_.train, "training"}, {&split_.validation, "validation"}}) {
    if (side->count < batch) {
      fail(Fault::data, "{}: too short: one batch needs {} windows of {} tokens, the {} protocol leaves {} for {}",
           corpus_.description(), batch, seq, name_of(protocol), side->count, name);
    }
  }
}

Batch Loader::batch_of(const Windows& windows, const std::vector<int64_t>& places) const {
  const Permutation order(kWindowOrder, windows.of);
  Batch batch;
  batch.batch = batch_;
  batch.seq = seq_;
  batch.tokens.resize(static_cast<size_t>(batch_ * seq_));
  batch.targets.resize(batch.tokens.size());
  std::vector<int32_t> window(static_cast<size_t>(seq_ + 1));
  for (int64_t b = 0; b < batch_; ++b) {
    copy_text(corpus_, windows, order(windows.first + places[b]) * windows.stride, seq_ + 1, window.data());
    std::copy_n(window.begin(), seq_, batch.tokens.begin() + b * seq_);
    std::copy_n(window.begin() + 1, seq_, batch.targets.begin() + b * seq_);
  }
  return batch;
}

Batch Loader::train(int64_t step) const {
  check(step >= 0 && step < (int64_t{1} << 62) / batch_, "a training step must be 0 or more, found {}", step);
  const int64_t count = split_.train.count;
  std::vector<int64_t> places(static_cast<size_t>(batch_));
  for (int64_t b = 0; b < batch_; ++b) {
    const int64_t sample = step * batch_ + b, epoch = sample / count;
    const RngKey key{seed_, stream_of("epoch") + static_cast<uint64_t>(epoch)};
    places[b] = Permutation(key, count)(sample % count);
  }
  return batch_of(split_.train, places);
}

Batch Loader::validation(int64_t i) const {
  check(i >= 0 && i < validation_batches(), "validation batch {} of {}", i, validation_batches());
  std::vector<int64_t> places(static_cast<size_t>(batch_));
  for (int64_t b = 0; b < batch_; ++b) places[b] = i * batch_ + b;
  return batch_of(split_.validation, places);
}

Prefetcher::Prefetcher(std::function<Batch(int64_t)> make, int64_t first, int64_t depth)
    : make_(std::move(make)), depth_(depth) {
  check(depth > 0, "a prefetcher must be at least 1 batch ahead, found {}", depth);
  thread_ = std::jthread([this, first](std::stop_token stop) { work(stop, first); });
}

void Prefetcher::work(std::stop_token stop, int64_t step) {
  try {
    for (; !stop.stop_requested(); ++step) {
      Batch batch = make_(step);
      std::unique_lock lock(mutex_);
      if (!changed_.wait(lock, stop, [&] { return static_cast<int64_t>(ready_.size()) < depth_; })) return;
      ready_.push_back(std::move(batch));
      changed_.notify_all();
    }
  } catch (...) {
    const std::scoped_lock lock(mutex_);
    failure_ = std::current_exception();
    changed_.notify_all();
  }
}

Batch Prefetcher::next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !ready_.empty() || failure_; });
  if (ready_.empty()) std::rethrow_exception(failure_);
  Batch batch = std::move(ready_.front());
  ready_.pop_front();
  changed_.notify_all();
  return batch;
}

}  // namespace weft
