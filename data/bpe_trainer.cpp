#include "data/bpe_trainer.h"

#include <algorithm>
#include <queue>
#include <unordered_set>

#include "data/tokenizer_words.h"
#include "engine/check.h"

namespace weft {
namespace {

uint64_t pair_of(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// How often a pair stands in the text, and the words that held it at some time.
struct Pair {
  int64_t count = 0;
  std::vector<int32_t> words;
};

struct Candidate {
  int64_t count;
  uint64_t pair;
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

struct Word {
  std::vector<int32_t> ids;
  int64_t count;
};

}  // namespace

void BpeTrainer::add(std::string_view text) {
  for_each_word(text, pre_tokenizer_, prefixed_, [&](std::string_view word) { ++words_[std::string(word)]; });
}

TokenizerContent BpeTrainer::train(int64_t vocab_size, const std::vector<std::string>& special,
                                   const std::function<void(int64_t)>& progress) const {
  const auto least = static_cast<int64_t>(special.size()) + 256;
  if (vocab_size < least || vocab_size >= 1 << 24) {
    fail(Fault::usage, "--vocab-size {}: expected {} (256 bytes and {} special tokens) to {}", vocab_size, least,
         special.size(), (1 << 24) - 1);
  }
  TokenizerContent content;
  content.pre_tokenizer = pre_tokenizer_;
  for (const std::string& text : special) {
    content.added.push_back({text, static_cast<int32_t>(content.tokens.size()), true, false});
    content.tokens.push_back(text);
  }
  // Bytes in the order of the characters that stand for them in the file: first those that print.
  const auto prints = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  std::array<int32_t, 256> byte_ids;
  for (const bool printing : {true, false}) {
    for (int b = 0; b < 256; ++b) {
      if (prints(b) != printing) continue;
      byte_ids[b] = static_cast<int32_t>(content.tokens.size());
      content.tokens.push_back(std::string(1, static_cast<char>(b)));
    }
  }

  std::vector<std::pair<std::string_view, int64_t>> sorted(words_.begin(), words_.end());
  std::sort(sorted.begin(), sorted.end());
  std::vector<Word> words;
  std::unordered_map<uint64_t, Pair> pairs;
  for (const auto& [text, count] : sorted) {
    Word& word = words.emplace_back();
    word.count = count;
    for (const char c : text) word.ids.push_back(byte_ids[static_cast<unsigned char>(c)]);
    for (size_t i = 0; i + 1 < word.ids.size(); ++i) {
      Pair& pair = pairs[pair_of(word.ids[i], word.ids[i + 1])];
      pair.count += count;
      const auto index = static_cast<int32_t>(words.size() - 1);
      if (pair.words.empty() || pair.words.back() != index) pair.words.push_back(index);
    }
  }
  std::priority_queue<Candidate> queue;
  for (const auto& [pair, state] : pairs) queue.push({state.count, pair});

  // A merge may give the text of a token that is there already (another way, or a special token): no second token then.
  std::unordered_set<std::string> texts(content.tokens.begin(), content.tokens.end());
  std::unordered_map<uint64_t, int64_t> changes;
  std::vector<uint64_t> order;
  while (static_cast<int64_t>(content.tokens.size()) < vocab_size && !queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Pair& best = pairs[top.pair];
    if (best.count != top.count) {
      if (best.count >= 2 && best.count < top.count) queue.push({best.count, top.pair});
      continue;
    }
    if (top.count < 2) break;
    const auto left = static_cast<int32_t>(top.pair >> 32), right = static_cast<int32_t>(top.pair);
    std::string text = content.tokens[left] + content.tokens[right];
    if (!texts.insert(text).second) continue;
    const auto merged = static_cast<int32_t>(content.tokens.size());
    content.tokens.push_back(std::move(text));
    content.merges.push_back({left, right, merged});

    changes.clear();
    order.clear();
    const std::vector<int32_t> held = std::move(best.words);
    for (const int32_t index : held) {
      Word& word = words[index];
      const auto change = [&](int32_t a, int32_t b, int64_t by) {
        const uint64_t pair = pair_of(a, b);
        if (changes.try_emplace(pair, 0).second) order.push_back(pair);
        changes[pair] += by;
        if (by > 0) {
          std::vector<int32_t>& list = pairs[pair].words;
          if (list.empty() || list.back() != index) list.push_back(index);
        }
      };
      std::vector<int32_t>& ids = word.ids;
      size_t to = 0;
      for (size_t i = 0; i < ids.size(); ++i) {
        if (i + 1 == ids.size() || ids[i] != left || ids[i + 1] != right) {
          ids[to++] = ids[i];
          continue;
        }
        if (to > 0) {
          change(ids[to - 1], left, -word.count);
          change(ids[to - 1], merged, word.count);
        }
        if (i + 2 < ids.size()) {
          change(right, ids[i + 2], -word.count);
          change(merged, ids[i + 2], word.count);
        }
        ids[to++] = merged;
        ++i;
      }
      ids.resize(to);
    }
    for (const uint64_t pair : order) {
      const int64_t by = changes[pair];
      if (by == 0) continue;
      Pair& state = pairs[pair];
      state.count += by;
      if (by > 0) queue.push({state.count, pair});
    }
    pairs.erase(top.pair);
    if (progress && content.tokens.size() % 512 == 0) progress(static_cast<int64_t>(content.tokens.size()));
  }
  content.in_model.assign(content.tokens.size(), true);
  return content;
}

}  // namespace weft
