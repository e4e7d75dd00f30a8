// A text as one long sequence of token ids, in which id 0 starts each document: token files one after the other, or the
// synthetic corpus. Used by Loader. A Corpus is a cheap handle: copies share the files or the memory.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/synthetic.h"

namespace weft {

inline constexpr int32_t kDocumentToken = 0;

class Corpus {
 public:
  // The files' tokens in the order given, the first `max_tokens` of them (0: all). Every file's format is checked, and
  // every id that is used, before this returns. A document may go on from one file into the next. A folder made by
  // tokenize stands for its training files. Files beside a manifest must agree with it, and its document token replaces
  // id 0.
  static Corpus open(const std::vector<std::string>& paths, int64_t vocab_size, int64_t max_tokens = 0);
  static Corpus synthetic(const SyntheticOptions& options);

  int64_t size() const;
  int64_t vocab_size() const;
  const Entropy& entropy() const;          // all nan unless synthetic
  const std::string& description() const;  // for messages and reports
  // Where documents start, rising. Position 0 always starts one.
  const std::vector<int64_t>& documents() const;

  void copy(int64_t from, int64_t n, int32_t* out) const;

 private:
  struct Content;
  explicit Corpus(std::shared_ptr<const Content> content) : content_(std::move(content)) {}
  std::shared_ptr<const Content> content_;
};

}  // namespace weft
