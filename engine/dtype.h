// Element types. f32 and bf16 on both devices, f64 on the CPU (gradient checks), i32 for ids and offsets, u16 for what
// bf16 lacks of f32 (Halves).
#pragma once
#include <bit>
#include <cstdint>

#include "engine/check.h"
#include "engine/random.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace weft {

enum class DType : uint8_t { f32, bf16, f64, i32, u16 };

constexpr int64_t size_of(DType t) { return t == DType::bf16 || t == DType::u16 ? 2 : t == DType::f64 ? 8 : 4; }
constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f64: return "f64";
    case DType::i32: return "i32";
    case DType::u16: return "u16";
  }
  return "no dtype";
}

// bfloat16: the upper half of a float32, rounded to nearest even. The same type on the CPU and in kernels.
struct alignas(2) bf16 {
  uint16_t bits;
  bf16() = default;
  WEFT_HD explicit bf16(float x) {
#ifdef __CUDA_ARCH__
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u
                                                                : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
  }
  WEFT_HD operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// A float as the bf16 nearest to it and its own lower 16 bits. Together they are the float again, to its last bit: the
// lower bits, read as a signed number, are what it is above or below that bf16. Ties round away from zero: to even,
// 65537 floats would share a bf16, and 16 bits tell 65536 apart. NaNs stay NaNs, where rounding would make -0 of
// 0x7fffffff; signalling ones become quiet.
struct Halves {
  bf16 nearest;
  uint16_t rest;
};
WEFT_HD inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
WEFT_HD inline Halves halves_of(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  Halves h;
  h.nearest.bits = static_cast<uint16_t>((is_nan(u) ? u | 0x400000u : u + 0x8000u) >> 16);
  h.rest = static_cast<uint16_t>(u);
  return h;
}
WEFT_HD inline float whole_of(Halves h) {
  const uint32_t upper = static_cast<uint32_t>(h.nearest.bits) << 16;
  const auto below_or_above = static_cast<uint32_t>(static_cast<int16_t>(h.rest));
  return std::bit_cast<float>(is_nan(upper) ? upper | h.rest : upper + below_or_above);
}

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr DType value = DType::f32; using acc = float; };
template <> struct TypeOf<bf16> { static constexpr DType value = DType::bf16; using acc = float; };
template <> struct TypeOf<double> { static constexpr DType value = DType::f64; using acc = double; };
template <> struct TypeOf<int32_t> { static constexpr DType value = DType::i32; using acc = int32_t; };
template <> struct TypeOf<uint16_t> { static constexpr DType value = DType::u16; using acc = uint16_t; };
template <class T> constexpr DType dtype_of = TypeOf<T>::value;
// The type sums are kept in: float for bf16, else the type itself.
template <class T> using acc_t = typename TypeOf<T>::acc;

struct Cpu {};
struct Cuda {};

// Calls f.template operator()<T>() with the C++ type of a floating dtype.
template <class F>
decltype(auto) dispatch(Cpu, DType t, F&& f) {
  switch (t) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    case DType::f64: return f.template operator()<double>();
    default: fail(Fault::internal, "a floating dtype is needed, found {}", name_of(t));
  }
}
template <class F>
decltype(auto) dispatch(Cuda, DType t, F&& f) {
  switch (t) {
    case DType::f32: return f.template operator()<float>();
    case DType::bf16: return f.template operator()<bf16>();
    default: fail(Fault::internal, "on a GPU the dtype must be f32 or bf16, found {}", name_of(t));
  }
}

}  // namespace weft
