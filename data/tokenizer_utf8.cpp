#include <algorithm>
#include <vector>

#include "data/tokenizer_unicode.h"

namespace weft {
namespace {

// Bytes of the well-formed sequence at `p`, or minus the bytes of the ill-formed part there (Unicode, table 3-7).
int sequence_length(const unsigned char* p, const unsigned char* end) {
  const unsigned char lead = p[0];
  if (lead < 0x80) return 1;
  int length = 0;
  unsigned char low = 0x80, high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return -1;
  }
  for (int i = 1; i < length; ++i) {
    if (p + i == end || p[i] < low || p[i] > high) return -i;
    low = 0x80, high = 0xBF;
  }
  return length;
}

}  // namespace

const uint8_t* unicode_classes() {
  static const std::vector<uint8_t> classes = [] {
    std::vector<uint8_t> all(0x110000);
    for (size_t i = 0; i < kUnicodeRunCount; ++i) {
      const size_t to = i + 1 < kUnicodeRunCount ? kUnicodeRuns[i + 1] >> 3 : all.size();
      std::fill(all.begin() + (kUnicodeRuns[i] >> 3), all.begin() + static_cast<int64_t>(to), kUnicodeRuns[i] & 7);
    }
    return all;
  }();
  return classes.data();
}

void append_utf8(std::string& out, char32_t code) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xE0 | code >> 12);
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
    }
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

size_t find_invalid_utf8(std::string_view text) {
  const auto* begin = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = begin + text.size();
  for (const auto* p = begin; p < end;) {
    const int length = sequence_length(p, end);
    if (length < 0) return static_cast<size_t>(p - begin);
    p += length;
  }
  return std::string_view::npos;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto* end = reinterpret_cast<const unsigned char*>(text.data()) + text.size();
  for (const auto* p = end - text.size(); p < end;) {
    const int length = sequence_length(p, end);
    if (length < 0) {
      out += "\xEF\xBF\xBD";
      p -= length;
    } else {
      out.append(reinterpret_cast<const char*>(p), static_cast<size_t>(length));
      p += length;
    }
  }
  return out;
}

int64_t count_code_points(std::string_view text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

}  // namespace weft
