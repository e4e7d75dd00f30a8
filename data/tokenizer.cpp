#include "data/tokenizer.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <unordered_map>

#include "data/tokenizer_file.h"
#include "data/tokenizer_words.h"
#include "engine/check.h"

namespace weft {
namespace {

constexpr size_t kSlots = 1 << 17;  // of the memory of words; twice the words kept
constexpr size_t kLongestKnown = 64;

}  // namespace

SpecialText special_text_from(std::string_view name) {
  if (name == "allow") return SpecialText::allow;
  if (name == "plain") return SpecialText::plain;
  if (name == "error") return SpecialText::error;
  fail(Fault::usage, "--special-in-text {}: expected allow, plain or error", name);
}

Tokenizer::Tokenizer(TokenizerContent content) {
  std::array<int32_t, 256> byte_ids;
  byte_ids.fill(-1);
  for (size_t id = 0; id < content.tokens.size(); ++id) {
    if (content.in_model[id] && content.tokens[id].size() == 1)
      byte_ids[static_cast<unsigned char>(content.tokens[id][0])] = static_cast<int32_t>(id);
  }
  bpe_ = std::make_shared<const Bpe>(byte_ids, content.merges);
  content_ = std::make_shared<const TokenizerContent>(std::move(content));
  auto whole_words = std::make_shared<std::unordered_map<std::string_view, int32_t>>();
  if (content_->ignore_merges) {
    for (size_t id = 0; id < content_->tokens.size(); ++id) {
      if (content_->in_model[id]) whole_words->emplace(content_->tokens[id], static_cast<int32_t>(id));
    }
  }
  whole_words_ = std::move(whole_words);
}

Tokenizer Tokenizer::open(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  if (!in || !(text << in.rdbuf())) fail(Fault::io, "{}: cannot read: {}", path, std::strerror(errno));
  const std::string json = text.str();
  Tokenizer tokenizer(parse_tokenizer(json, path));
  tokenizer.hash_ = fmt::format("{:016x}", XXH3_64bits(json.data(), json.size()));
  return tokenizer;
}

Tokenizer Tokenizer::bytes() {
  TokenizerContent content;
  for (int b = 0; b < 256; ++b) content.tokens.push_back(std::string(1, static_cast<char>(b)));
  content.in_model.assign(256, true);
  content.tokens.push_back("<|endoftext|>");
  content.in_model.push_back(false);
  content.added = {{"<|endoftext|>", 256, true, false}};
  Tokenizer tokenizer(std::move(content));
  tokenizer.bpe_ = nullptr;
  tokenizer.hash_ = "bytes";
  return tokenizer;
}

int32_t Tokenizer::id_of(std::string_view token) const {
  for (const AddedToken& added : content_->added) {
    if (added.text == token) return added.id;
  }
  const auto found = std::find(content_->tokens.begin(), content_->tokens.end(), token);
  return found == content_->tokens.end() || token.empty() ? -1 : static_cast<int32_t>(found - content_->tokens.begin());
}

const std::string& Tokenizer::text_of(int64_t id) const {
  if (id < 0 || id >= vocab_size()) fail(Fault::data, "id {} is not below the vocabulary size {}", id, vocab_size());
  return content_->tokens[id];
}

bool Tokenizer::may_split() const {
  return (is_bytes() || content_->pre_tokenizer.use_regex) &&
         std::none_of(content_->added.begin(), content_->added.end(),
                      [](const AddedToken& t) { return t.text.find(' ') != std::string::npos; });
}

Encoder::Encoder(const Tokenizer& tokenizer, SpecialText special)
    : tokenizer_(tokenizer), special_(special), slots_(kSlots) {
  for (const AddedToken& token : tokenizer_.content_->added) {
    added_[token.normalized][static_cast<unsigned char>(token.text[0])].push_back(&token);
    any_added_[token.normalized] = true;
  }
  for (auto& group : added_) {
    for (auto& tokens : group) {
      std::stable_sort(tokens.begin(), tokens.end(), [](auto* a, auto* b) { return a->text.size() > b->text.size(); });
    }
  }
}

void Encoder::encode(std::string_view text, std::vector<int32_t>& out) { encode_piece(text, 0, out); }

// Cuts at the added tokens of group `group`, the leftmost first and the longest of those that begin there; what lies
// between is cut at the next group's.
void Encoder::encode_piece(std::string_view text, size_t group, std::vector<int32_t>& out) {
  if (group == added_.size()) return encode_plain(text, out);
  if (!any_added_[group]) return encode_piece(text, group + 1, out);
  size_t from = 0;
  for (size_t i = 0; i < text.size();) {
    const auto& candidates = added_[group][static_cast<unsigned char>(text[i])];
    const auto hit = std::find_if(candidates.begin(), candidates.end(),
                                  [&](const AddedToken* t) { return text.substr(i).starts_with(t->text); });
    if (hit == candidates.end()) {
      ++i;
      continue;
    }
    const AddedToken& token = **hit;
    special_found_ += token.special;
    if (token.special && special_ == SpecialText::error) {
      fail(Fault::data, "the text holds the special token {} (--special-in-text=allow or plain accepts it)",
           token.text);
    }
    if (!token.special || special_ == SpecialText::allow) {
      if (i > from) encode_piece(text.substr(from, i - from), group + 1, out);
      out.push_back(token.id);
      from = i + token.text.size();
    }
    i += token.text.size();
  }
  if (from < text.size()) encode_piece(text.substr(from), group + 1, out);
}

void Encoder::encode_plain(std::string_view text, std::vector<int32_t>& out) {
  if (tokenizer_.is_bytes()) {
    for (const char c : text) out.push_back(static_cast<unsigned char>(c));
    return;
  }
  for_each_word(text, tokenizer_.content_->pre_tokenizer, prefixed_,
                [&](std::string_view word) { encode_word(word, out); });
}

void Encoder::encode_word(std::string_view word, std::vector<int32_t>& out) {
  if (word.size() > kLongestKnown) return encode_new_word(word, out);
  const uint64_t hash = XXH3_64bits(word.data(), word.size()) | 1;
  size_t i = hash >> 40 & (kSlots - 1);
  for (; slots_[i].hash != 0; i = (i + 1) & (kSlots - 1)) {
    const Slot& slot = slots_[i];
    if (slot.hash == hash && slot.word_bytes == word.size() &&
        std::memcmp(words_.data() + slot.word, word.data(), word.size()) == 0) {
      const int32_t* ids = ids_.data() + slot.ids;
      out.insert(out.end(), ids, ids + slot.id_count);
      return;
    }
  }
  const size_t before = out.size();
  encode_new_word(word, out);
  if (known_ == kSlots / 2) return;  // full: memory stays bounded, and frequent words came early
  ++known_;
  slots_[i] = {hash, static_cast<uint32_t>(words_.size()), static_cast<uint32_t>(ids_.size()),
               static_cast<uint16_t>(word.size()), static_cast<uint16_t>(out.size() - before)};
  words_.append(word);
  ids_.insert(ids_.end(), out.begin() + static_cast<int64_t>(before), out.end());
}

void Encoder::encode_new_word(std::string_view word, std::vector<int32_t>& out) const {
  if (tokenizer_.content_->ignore_merges) {
    const auto whole = tokenizer_.whole_words_->find(word);
    if (whole != tokenizer_.whole_words_->end()) return out.push_back(whole->second);
  }
  tokenizer_.bpe_->encode(word, out);
}

}  // namespace weft
