// Counter-based random numbers (Philox4x32; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// A number is a pure function of (seed, stream, index): the CPU and the GPU draw the same bits, and a mask can
// be drawn again where it is needed instead of being stored.
#pragma once
#include <cmath>
#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define WEFT_HD __host__ __device__
#else
#define WEFT_HD
#endif

namespace weft {

// One random field: element i is philox(seed, stream, i / 4)[i % 4]. Where `step` is given, the stream is that of the
// training step found there when a kernel runs, so a captured step draws anew at every replay: whatever draws begins
// with key.at_step().
struct RngKey {
  uint64_t seed = 0;
  uint64_t stream = 0;
  const uint64_t* step = nullptr;  // in memory of the device that draws

  WEFT_HD RngKey at_step() const { return step ? RngKey{seed, stream + stream_of_step(*step)} : *this; }
  // The first of the 2^20 streams of a step.
  WEFT_HD static uint64_t stream_of_step(uint64_t step) { return step << 20; }
};

struct Philox4 {
  uint32_t v[4];
};

// Both halves of a product. Kernels name the instruction: written as a product of 64 bits, each of a mask's 12 or 14 is
// followed by an addition of zero.
WEFT_HD inline uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

template <int kRounds = 10>
WEFT_HD inline Philox4 philox(RngKey key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(key.stream), c3 = static_cast<uint32_t>(key.stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 32 random bits of element `index`.
WEFT_HD inline uint32_t random_bits(RngKey key, uint64_t index) { return philox(key, index / 4).v[index % 4]; }

// A dropout mask: element i has 16 bits of its own, half i % 8 of philox<7>(key, i / 8), and is kept where they are below
// `threshold`. Seven rounds are the fewest that pass every test of the paper; two elements a word and three rounds less
// make a mask three times cheaper to draw. The probability is rounded to 2^-16, and scale() is that of the rounded one.
struct Mask {
  RngKey key;
  uint32_t threshold = 0;  // 1 .. 65535; 65536, which keeps all, where p is 0
  Mask() = default;
  Mask(RngKey key, double p) : key(key), threshold(static_cast<uint32_t>((1 - p) * 65536 + 0.5)) {
    threshold = threshold < 1 ? 1 : threshold > 65535 && p > 0 ? 65535 : threshold;
  }
  double scale() const { return 65536.0 / threshold; }  // of what is kept
};

// Elements 8 `group` .. 8 `group` + 7 of a mask; mask.key is already at_step().
struct Kept8 {
  Philox4 bits{};
  uint32_t last = 0;  // that is kept: threshold - 1 in the upper half, with ones below
  Kept8() = default;
  WEFT_HD Kept8(const Mask& mask, uint64_t group)
      : bits(philox<7>(mask.key, group)), last((mask.threshold << 16) - 1) {}
  // Moves elements 4 .. 7 to the front.
  WEFT_HD void skip_four() { bits.v[0] = bits.v[2], bits.v[1] = bits.v[3]; }
  WEFT_HD bool operator[](int j) const { return (j % 2 ? bits.v[j / 2] : bits.v[j / 2] << 16) <= last; }
};

// Uniform in (0, 1).
WEFT_HD inline float to_uniform(uint32_t bits) {
  return (static_cast<float>(bits >> 8) + 0.5f) * (1.0f / 16777216.0f);
}

// Standard normal of element `index` (Box-Muller; elements 2j and 2j+1 share a pair of uniforms).
WEFT_HD inline float random_normal(RngKey key, uint64_t index) {
  const Philox4 r = philox(key, index / 4);
  const int pair = static_cast<int>(index % 4) / 2 * 2;
  const float radius = sqrtf(-2.0f * logf(to_uniform(r.v[pair])));
  const float angle = 6.2831853071795865f * to_uniform(r.v[pair + 1]);
  return radius * (index % 2 == 0 ? cosf(angle) : sinf(angle));
}

// Uniform integer in [0, bound); bias below bound / 2^64.
WEFT_HD inline uint64_t random_below(RngKey key, uint64_t index, uint64_t bound) {
  const Philox4 r = philox(key, index);
  const uint64_t bits = uint64_t{r.v[0]} << 32 | r.v[1];
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * bound) >> 64);
}

// A stable 64-bit number for a name (FNV-1a): gives each parameter, and each random decision, a stream of its own.
constexpr uint64_t stream_of(std::string_view name) {
  uint64_t h = 0xcbf29ce484222325u;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

// Hands out one fresh key per random op of a step, in program order: the same (seed, step) gives the same sequence.
class Rng {
 public:
  Rng(uint64_t seed, uint64_t step) : next_{seed, RngKey::stream_of_step(step)} {}
  // The step is read where and when an op draws: it must stay there until the step's backward pass is done.
  Rng(uint64_t seed, const uint64_t* step) : next_{seed, 0, step} {}
  RngKey next() {
    const RngKey key = next_;
    ++next_.stream;
    return key;
  }

 private:
  RngKey next_;
};

}  // namespace weft
