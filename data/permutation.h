// A random permutation of 0 .. n-1 that is computed where it is asked and stored nowhere: a Feistel network over the
// smallest even number of bits that holds n, walked until it lands below n (Black and Rogaway, "Ciphers with arbitrary
// finite domains", 2002). Used by Loader to order millions of windows.
#pragma once
#include <bit>
#include <cstdint>

#include "engine/check.h"
#include "engine/random.h"

namespace weft {

class Permutation {
 public:
  Permutation(RngKey key, int64_t n) : key_(key), n_(static_cast<uint64_t>(n)) {
    check(n > 0 && n < int64_t{1} << 60, "a permutation must have 1 to 2^60 elements, found {}", n);
    half_bits_ = (std::bit_width(n_ - 1) + 1) / 2;
    if (half_bits_ == 0) half_bits_ = 1;
  }

  int64_t operator()(int64_t i) const {
    check(i >= 0 && static_cast<uint64_t>(i) < n_, "element {} of a permutation of {}", i, n_);
    auto x = static_cast<uint64_t>(i);
    do x = shuffle_bits(x);
    while (x >= n_);
    return static_cast<int64_t>(x);
  }

 private:
  uint64_t shuffle_bits(uint64_t x) const {
    const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
    uint64_t left = x >> half_bits_, right = x & mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t mixed = left ^ (philox(key_, round << 32 | right).v[0] & mask);
      left = right;
      right = mixed;
    }
    return left << half_bits_ | right;
  }

  RngKey key_;
  uint64_t n_;
  int half_bits_;
};

}  // namespace weft
