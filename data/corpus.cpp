#include "data/corpus.h"

#include <algorithm>

#include "data/manifest.h"
#include "data/token_file.h"
#include "engine/check.h"

namespace weft {

// Either `files`, file i holding positions [ends[i-1], ends[i]), or `tokens` in memory.
struct Corpus::Content {
  std::vector<TokenFile> files;
  std::vector<int64_t> ends;
  std::vector<int32_t> tokens;
  int64_t size = 0;
  int64_t vocab_size = 0;
  int64_t document_token = kDocumentToken;
  Entropy entropy;
  std::string description;
  std::vector<int64_t> documents;

  void copy(int64_t from, int64_t n, int32_t* out) const {
    if (files.empty()) {
      std::copy_n(tokens.begin() + from, n, out);
      return;
    }
    auto i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), from) - ends.begin());
    while (n > 0) {
      const int64_t part = std::min(n, ends[i] - from);
      files[i].copy(from - (i == 0 ? 0 : ends[i - 1]), part, out);
      from += part, out += part, n -= part, ++i;
    }
  }

  void find_documents() {
    constexpr int64_t kBlock = 1 << 16;
    std::vector<int32_t> block(static_cast<size_t>(std::min(size, kBlock)));
    documents = {0};
    for (int64_t from = 0; from < size; from += kBlock) {
      const int64_t n = std::min(kBlock, size - from);
      copy(from, n, block.data());
      for (int64_t i = from == 0 ? 1 : 0; i < n; ++i) {
        if (block[i] == document_token) documents.push_back(from + i);
      }
    }
  }
};

Corpus Corpus::open(const std::vector<std::string>& given, int64_t vocab_size, int64_t max_tokens) {
  if (given.empty()) fail(Fault::usage, "no token file given");
  check(vocab_size > 0 && vocab_size <= int64_t{1} << 31, "the vocabulary size must be 1 to 2^31, found {}",
        vocab_size);
  check(max_tokens >= 0, "the number of tokens to use must not be negative, found {}", max_tokens);
  auto content = std::make_shared<Content>();
  content->vocab_size = vocab_size;
  std::vector<std::string> paths;
  for (const std::string& path : given) {
    const std::vector<std::string> files = token_files_of(path);
    paths.insert(paths.end(), files.begin(), files.end());
  }
  std::vector<TokenFile> files;
  files.reserve(paths.size());
  for (const std::string& path : paths) {
    const TokenFile& file = files.emplace_back(path);
    for (size_t i = 0; i + 1 < files.size(); ++i) {
      // A text given twice would put held-out documents into training.
      if (file.is_same_file(files[i])) fail(Fault::usage, "{}: the same file as {}, given twice", path, paths[i]);
    }
  }
  std::optional<Manifest> first;
  for (const TokenFile& file : files) {
    std::optional<Manifest> manifest = check_token_file(file.path(), vocab_size);
    if (!manifest) continue;
    if (first && first->tokenizer_hash != manifest->tokenizer_hash) {
      fail(Fault::data,
           "{}: its tokenizer's hash is {}, that of the files before it {}: their ids mean different things",
           file.path(), manifest->tokenizer_hash, first->tokenizer_hash);
    }
    if (manifest->document_token_id >= 0) content->document_token = manifest->document_token_id;
    first = std::move(manifest);
  }
  for (TokenFile& file : files) {
    const int64_t room = max_tokens == 0 ? file.size() : max_tokens - content->size;
    if (room == 0) break;
    const int64_t used = std::min(file.size(), room);
    file.check_ids(used, vocab_size);
    content->size += used;
    content->ends.push_back(content->size);
    content->files.push_back(std::move(file));
  }
  content->description = fmt::format("{} tokens of {}", content->size, content->files.front().path());
  if (content->files.size() > 1) content->description += fmt::format(" and {} more", content->files.size() - 1);
  content->find_documents();
  return Corpus(std::move(content));
}

Corpus Corpus::synthetic(const SyntheticOptions& options) {
  auto content = std::make_shared<Content>();
  SyntheticText text = generate_text(options);
  content->tokens = std::move(text.tokens);
  content->entropy = text.entropy;
  content->size = static_cast<int64_t>(content->tokens.size());
  content->vocab_size = options.vocab_size;
  content->description = fmt::format("{} tokens of the synthetic corpus (vocabulary {}, seed {})", content->size,
                                     options.vocab_size, options.seed);
  content->find_documents();
  return Corpus(std::move(content));
}

int64_t Corpus::size() const { return content_->size; }
int64_t Corpus::vocab_size() const { return content_->vocab_size; }
const Entropy& Corpus::entropy() const { return content_->entropy; }
const std::string& Corpus::description() const { return content_->description; }
const std::vector<int64_t>& Corpus::documents() const { return content_->documents; }

void Corpus::copy(int64_t from, int64_t n, int32_t* out) const {
  check(from >= 0 && n >= 0 && n <= size() && from <= size() - n,
        "tokens [{}, {} + {}) must lie in a corpus of {} tokens", from, from, n, size());
  content_->copy(from, n, out);
}

}  // namespace weft
