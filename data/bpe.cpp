#include "data/bpe.h"

#include <bit>
#include <queue>

namespace weft {
namespace {

uint64_t key_of(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

uint64_t hash_of(uint64_t pair) {
  pair *= 0x9E3779B97F4A7C15u;
  return pair ^ pair >> 32;
}

}  // namespace

Bpe::Bpe(const std::array<int32_t, 256>& byte_ids, const std::vector<Merge>& merges) : byte_ids_(byte_ids) {
  slots_.resize(std::bit_ceil(2 * merges.size() + 2));
  mask_ = slots_.size() - 1;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = key_of(merges[rank].left, merges[rank].right);
    uint64_t i = hash_of(pair) & mask_;
    while (slots_[i].rank != kNone && slots_[i].pair != pair) i = (i + 1) & mask_;
    slots_[i] = {pair, static_cast<uint32_t>(rank), merges[rank].merged};
  }
}

const Bpe::Slot& Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = key_of(left, right);
  uint64_t i = hash_of(pair) & mask_;
  while (slots_[i].pair != pair && slots_[i].rank != kNone) i = (i + 1) & mask_;
  return slots_[i];
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& out) const {
  constexpr size_t kShort = 48;  // up to here looking at every pair is faster than a heap
  if (word.size() <= kShort) {
    int32_t ids[kShort];
    int64_t n = 0;
    for (const char c : word) {
      ids[n] = byte_ids_[static_cast<unsigned char>(c)];
      n += ids[n] >= 0;
    }
    return merge_short(ids, n, out);
  }
  std::vector<int32_t> ids;
  ids.reserve(word.size());
  for (const char c : word) {
    const int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id >= 0) ids.push_back(id);
  }
  merge_long(ids, out);
}

void Bpe::merge_short(int32_t* ids, int64_t n, std::vector<int32_t>& out) const {
  uint32_t ranks[64];
  int32_t merged[64];
  const auto look = [&](int64_t i) {
    const Slot& slot = find(ids[i], ids[i + 1]);
    ranks[i] = slot.rank;
    merged[i] = slot.merged;
  };
  for (int64_t i = 0; i + 1 < n; ++i) look(i);
  while (n > 1) {
    int64_t best = 0;
    for (int64_t i = 1; i + 1 < n; ++i) best = ranks[i] < ranks[best] ? i : best;
    if (ranks[best] == kNone) break;
    ids[best] = merged[best];
    --n;
    for (int64_t i = best + 1; i < n; ++i) ids[i] = ids[i + 1];
    for (int64_t i = best + 1; i + 1 < n; ++i) ranks[i] = ranks[i + 1], merged[i] = merged[i + 1];
    if (best > 0) look(best - 1);
    if (best + 1 < n) look(best);
  }
  out.insert(out.end(), ids, ids + n);
}

void Bpe::merge_long(const std::vector<int32_t>& word, std::vector<int32_t>& out) const {
  struct Symbol {
    int32_t id;  // -1: merged away
    int64_t before, after;
  };
  struct Candidate {
    uint32_t rank;
    int32_t left, right, merged;
    int64_t at;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  const auto n = static_cast<int64_t>(word.size());
  std::vector<Symbol> symbols(word.size());
  for (int64_t i = 0; i < n; ++i) symbols[i] = {word[i], i - 1, i + 1 < n ? i + 1 : -1};
  std::priority_queue<Candidate> queue;
  const auto offer = [&](int64_t at) {
    if (at < 0 || symbols[at].after < 0) return;
    const int32_t left = symbols[at].id, right = symbols[symbols[at].after].id;
    const Slot& slot = find(left, right);
    if (slot.rank != kNone) queue.push({slot.rank, left, right, slot.merged, at});
  };
  for (int64_t i = 0; i < n; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& symbol = symbols[top.at];
    const int64_t after = symbol.after;
    if (symbol.id != top.left || after < 0 || symbols[after].id != top.right) continue;
    symbol.id = top.merged;
    symbol.after = symbols[after].after;
    symbols[after].id = -1;
    if (symbol.after >= 0) symbols[symbol.after].before = top.at;
    offer(symbol.before);
    offer(top.at);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.id >= 0) out.push_back(symbol.id);
  }
}

}  // namespace weft
