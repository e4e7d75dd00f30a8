#include "tools/report/tensorboard.h"

#include <array>
#include <bit>

namespace weft {
namespace {

template <class T>
std::string little_endian(T value) {
  std::string out;
  for (size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 128; value >>= 7) out += static_cast<char>(value | 128);
  return out + static_cast<char>(value);
}

// A protobuf field: the tag is its number and its wire type (0 varint, 1 eight bytes, 2 a length, 5 four bytes).
std::string tag(int number, int type) { return varint(static_cast<uint64_t>(number << 3 | type)); }
std::string bytes_field(int number, const std::string& bytes) { return tag(number, 2) + varint(bytes.size()) + bytes; }
std::string double_field(int number, double x) { return tag(number, 1) + little_endian(std::bit_cast<uint64_t>(x)); }
std::string float_field(int number, float x) { return tag(number, 5) + little_endian(std::bit_cast<uint32_t>(x)); }
std::string integer_field(int number, int64_t x) { return tag(number, 0) + varint(static_cast<uint64_t>(x)); }

// The format rotates and shifts each checksum, so that a checksum of checksummed data is no special case.
std::string masked_crc(std::string_view bytes) {
  return little_endian(std::rotr(crc32c(bytes), 15) + 0xa282ead8u);
}

std::string record(const std::string& data) {
  const std::string length = little_endian(static_cast<uint64_t>(data.size()));
  return length + masked_crc(length) + data + masked_crc(data);
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t;
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (const char byte : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(byte)) & 255];
  return ~crc;
}

// Event: 1 wall_time, 2 step, 3 file_version, 5 summary. Summary: 1 value. Value: 1 tag, 2 simple_value.
std::string tensorboard_events(std::span<const ScalarEvent> events) {
  std::string out = record(double_field(1, 0) + bytes_field(3, "brain.Event:2"));
  for (const ScalarEvent& e : events) {
    std::string summary;
    for (const auto& [name, value] : e.values) summary += bytes_field(1, bytes_field(1, name) + float_field(2, value));
    out += record(double_field(1, e.wall_time) + integer_field(2, e.step) + bytes_field(5, summary));
  }
  return out;
}

}  // namespace weft
