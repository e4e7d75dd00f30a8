// Byte-pair encoding of one word: the pair of neighbours with the lowest rank merges first, the leftmost of equals.
// Used by Tokenizer and the trainer's test.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace weft {

class Bpe {
 public:
  struct Merge {
    int32_t left, right, merged;
  };
  // `byte_ids[b]` is the token of byte b, -1 where there is none: such bytes vanish, as they do in Hugging Face's
  // library. A pair's rank is its place in `merges`; of a pair listed twice the later one counts.
  Bpe(const std::array<int32_t, 256>& byte_ids, const std::vector<Merge>& merges);

  void encode(std::string_view word, std::vector<int32_t>& out) const;

 private:
  struct Slot {
    uint64_t pair = ~uint64_t{0};
    uint32_t rank = kNone;
    int32_t merged = 0;
  };
  static constexpr uint32_t kNone = ~uint32_t{0};

  const Slot& find(int32_t left, int32_t right) const;
  void merge_short(int32_t* ids, int64_t n, std::vector<int32_t>& out) const;
  void merge_long(const std::vector<int32_t>& ids, std::vector<int32_t>& out) const;

  std::array<int32_t, 256> byte_ids_;
  std::vector<Slot> slots_;  // open addressing, a power of two
  uint64_t mask_ = 0;
};

}  // namespace weft
