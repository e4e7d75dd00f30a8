// Trains a byte-level BPE: the most frequent pair of neighbours becomes a token, again and again. Used by
// train_tokenizer.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/tokenizer.h"

namespace weft {

class BpeTrainer {
 public:
  explicit BpeTrainer(PreTokenizer pre_tokenizer) : pre_tokenizer_(pre_tokenizer) {}

  // Counts the words of valid UTF-8.
  void add(std::string_view text);

  // A tokenizer of at most `vocab_size` tokens: the special ones first, then the bytes, then what merges made. Of pairs
  // equally frequent the one with the smaller ids merges first, so the same text gives the same tokenizer. Fewer tokens
  // come out where no pair stands twice.
  TokenizerContent train(int64_t vocab_size, const std::vector<std::string>& special,
                         const std::function<void(int64_t tokens)>& progress) const;
  int64_t distinct_words() const { return static_cast<int64_t>(words_.size()); }

 private:
  PreTokenizer pre_tokenizer_;
  std::unordered_map<std::string, int64_t> words_;
  std::string prefixed_;
};

}  // namespace weft
