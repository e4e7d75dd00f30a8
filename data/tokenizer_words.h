// Cuts text into the words that BPE encodes, as the pre-tokenizers Digits and ByteLevel do. Used by Encoder and
// BpeTrainer.
#pragma once
#include <string>
#include <string_view>

#include "data/tokenizer.h"
#include "data/tokenizer_unicode.h"

namespace weft {

// The first word at `p` of GPT-2's pattern:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
inline const char* end_of_word(const char* p, const char* end, const uint8_t* classes) {
  const auto class_at = [&](const char*& q) {
    const auto byte = static_cast<unsigned char>(*q);
    if (byte < 0x80) return ++q, static_cast<uint8_t>(classes[byte] & 3);
    return static_cast<uint8_t>(classes[next_code_point(q)] & 3);
  };
  if (*p == '\'' && end - p >= 2) {
    const char a = p[1];
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
    if (end - p >= 3) {
      const char b = p[2];
      if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return p + 3;
    }
  }
  const char* q = p;
  uint8_t kind = class_at(q);
  if (*p == ' ' && q < end) {
    const char* r = q;
    const uint8_t following = class_at(r);
    if (following != kSpace) kind = following, q = r;
  }
  const char* last = p;  // where the run's last code point begins
  while (q < end) {
    const char* r = q;
    if (class_at(r) != kind) break;
    last = q;
    q = r;
  }
  // White space before a word leaves its last character to the word.
  if (kind == kSpace && q < end && last > p) return last;
  return q;
}

// What Digits makes one piece: without digits, or digits only.
template <class Take>
void for_each_piece(std::string_view text, PreTokenizer::Digits digits, const uint8_t* classes, Take&& take) {
  if (digits == PreTokenizer::Digits::together) return take(text);
  const char* p = text.data();
  const char* end = p + text.size();
  const auto is_digit = [&](const char* q, const char*& after) {
    const auto byte = static_cast<unsigned char>(*q);
    after = q + 1;
    if (byte < 0x80) return byte >= '0' && byte <= '9';
    after = q;
    return (classes[next_code_point(after)] & kNumeric) != 0;
  };
  while (p < end) {
    const char *q = p, *after = p;
    while (q < end && !is_digit(q, after)) q = after;
    if (q > p) take(std::string_view(p, static_cast<size_t>(q - p)));
    if (q == end) return;
    p = q;
    q = after;
    if (digits == PreTokenizer::Digits::in_runs) {
      while (q < end && is_digit(q, after)) q = after;
    }
    take(std::string_view(p, static_cast<size_t>(q - p)));
    p = q;
  }
}

// `prefixed` is room for a piece with a space before it.
template <class Take>
void for_each_word(std::string_view text, const PreTokenizer& pre_tokenizer, std::string& prefixed, Take&& take) {
  const uint8_t* classes = unicode_classes();
  for_each_piece(text, pre_tokenizer.digits, classes, [&](std::string_view piece) {
    if (pre_tokenizer.add_prefix_space && !piece.starts_with(' ')) {
      prefixed.assign(1, ' ').append(piece);
      piece = prefixed;
    }
    if (!pre_tokenizer.use_regex) return take(piece);
    const char* end = piece.data() + piece.size();
    for (const char *p = piece.data(), *q; p < end; p = q) {
      q = end_of_word(p, end, classes);
      take(std::string_view(p, static_cast<size_t>(q - p)));
    }
  });
}

}  // namespace weft
