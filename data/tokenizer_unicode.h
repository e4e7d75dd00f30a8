// What a code point is to the ByteLevel and Digits pre-tokenizers, and UTF-8. Used by the tokenizer and the text input.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace weft {

// A code point's class: one of the first four, which are the pattern's \p{L}, \p{N}, \s and the rest, with kNumeric
// added where Digits sees a digit (Rust's char::is_numeric, of a newer Unicode than the pattern's).
inline constexpr uint8_t kLetter = 0, kNumber = 1, kSpace = 2, kOther = 3, kNumeric = 4;

extern const uint32_t kUnicodeRuns[];  // tokenizer_unicode.cpp, generated
extern const size_t kUnicodeRunCount;

// kUnicodeRuns spread out: one class per code point.
const uint8_t* unicode_classes();

// The code point at `p` of valid UTF-8, and `p` moved behind it.
inline char32_t next_code_point(const char*& p) {
  const auto at = [&](int i) { return static_cast<char32_t>(static_cast<unsigned char>(p[i])); };
  const char32_t lead = at(0);
  if (lead < 0x80) return ++p, lead;
  char32_t code;
  if (lead < 0xE0) return code = (lead & 0x1F) << 6 | (at(1) & 0x3F), p += 2, code;
  if (lead < 0xF0) return code = (lead & 0x0F) << 12 | (at(1) & 0x3F) << 6 | (at(2) & 0x3F), p += 3, code;
  return code = (lead & 7) << 18 | (at(1) & 0x3F) << 12 | (at(2) & 0x3F) << 6 | (at(3) & 0x3F), p += 4, code;
}

void append_utf8(std::string& out, char32_t code);

// Where the first byte that is no UTF-8 stands, or npos.
size_t find_invalid_utf8(std::string_view text);

// The text with U+FFFD for each ill-formed part (the maximal subparts that Unicode, Python and Rust replace).
std::string replace_invalid_utf8(std::string_view text);

// Code points in valid UTF-8.
int64_t count_code_points(std::string_view text);

}  // namespace weft
