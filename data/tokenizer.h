// Text to token ids and back, exactly as Hugging Face's library does it for byte-level BPE (GPT-2, SmolLM, StarCoder),
// or one id per byte. Used by the tools tokenize, detokenize and train_tokenizer.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "data/bpe.h"

namespace weft {

// Text that is itself the name of a special token, such as "<|endoftext|>".
enum class SpecialText {
  allow,  // becomes the special token, as in Hugging Face's encode
  plain,  // is encoded like any other text
  error,  // Fault::data
};
SpecialText special_text_from(std::string_view name);  // Fault::usage for another name

// A string that is found in the text before anything else happens to it.
struct AddedToken {
  std::string text;
  int32_t id = 0;
  bool special = false;
  bool normalized = false;  // looked for after those that are not
};

// What happens to the text before BPE, as tokenizer.json says it.
struct PreTokenizer {
  enum class Digits { together, each_alone, in_runs };  // together: no Digits step
  Digits digits = Digits::together;
  bool add_prefix_space = false;
  bool use_regex = true;
};

// All that a tokenizer.json says. Token texts are bytes, not the characters that stand for them in the file.
struct TokenizerContent {
  std::vector<std::string> tokens;  // by id; a hole is an empty string
  std::vector<bool> in_model;       // by id: a vocabulary entry that BPE can give
  std::vector<Bpe::Merge> merges;
  std::vector<AddedToken> added;
  PreTokenizer pre_tokenizer;
  bool ignore_merges = false;  // a word that is a token is that token
  std::vector<std::string> warnings;
  int64_t holes = 0;
};

class Tokenizer {
 public:
  // Reads a tokenizer.json; Fault::data names what is wrong or unknown in it, and where.
  static Tokenizer open(const std::string& path);
  // Id b is byte b; id 256 is <|endoftext|>.
  static Tokenizer bytes();
  explicit Tokenizer(TokenizerContent content);

  int64_t vocab_size() const { return static_cast<int64_t>(content_->tokens.size()); }
  bool is_bytes() const { return bpe_ == nullptr; }
  // The id of an added token or of a vocabulary entry given as bytes; -1 if there is none.
  int32_t id_of(std::string_view token) const;
  // The bytes of one token. Fault::data for an id that is not below the vocabulary size.
  const std::string& text_of(int64_t id) const;
  const std::vector<std::string>& warnings() const { return content_->warnings; }
  const TokenizerContent& content() const { return *content_; }
  // XXH3 of the file, 16 hexadecimal digits; "bytes" for bytes().
  const std::string& hash() const { return hash_; }
  // True if text may be encoded in parts, cut where a letter or digit is followed by a space.
  bool may_split() const;

 private:
  friend class Encoder;
  std::shared_ptr<const TokenizerContent> content_;
  std::shared_ptr<const Bpe> bpe_;  // null for bytes()
  // With ignore_merges: the vocabulary by its bytes, which are content_'s.
  std::shared_ptr<const std::unordered_map<std::string_view, int32_t>> whole_words_;
  std::string hash_;
};

// Encodes with a memory of words seen. One for each thread.
class Encoder {
 public:
  Encoder(const Tokenizer& tokenizer, SpecialText special);

  // Appends the ids of valid UTF-8.
  void encode(std::string_view text, std::vector<int32_t>& out);
  // How often the text held a special token's name.
  int64_t special_found() const { return special_found_; }

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t word = 0, ids = 0;  // places in words_ and ids_
    uint16_t word_bytes = 0, id_count = 0;
  };
  void encode_piece(std::string_view text, size_t group, std::vector<int32_t>& out);
  void encode_plain(std::string_view text, std::vector<int32_t>& out);
  void encode_word(std::string_view word, std::vector<int32_t>& out);
  void encode_new_word(std::string_view word, std::vector<int32_t>& out) const;

  Tokenizer tokenizer_;
  SpecialText special_;
  int64_t special_found_ = 0;
  // Added tokens in two groups (not normalized, normalized), by first byte, longest first.
  std::array<std::array<std::vector<const AddedToken*>, 256>, 2> added_;
  std::array<bool, 2> any_added_{};
  std::vector<Slot> slots_;
  std::string words_, prefixed_;
  std::vector<int32_t> ids_;
  int64_t known_ = 0;
};

}  // namespace weft
