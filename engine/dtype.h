// Element types. f32 and bf16 on both devices, f64 on the CPU (gradient checks), i32 for ids and offsets.
#pragma once
#include <bit>
#include <cstdint>

#include "engine/check.h"
#include "engine/random.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace weft {

enum class DType : uint8_t { f32, bf16, f64, i32 };

constexpr int64_t size_of(DType t) { return t == DType::bf16 ? 2 : t == DType::f64 ? 8 : 4; }
constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f64: return "f64";
    case DType::i32: return "i32";
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
  WEFT_HD operator float() const {
#ifdef __CUDA_ARCH__
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
#else
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
#endif
  }
};

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr DType value = DType::f32; using acc = float; };
template <> struct TypeOf<bf16> { static constexpr DType value = DType::bf16; using acc = float; };
template <> struct TypeOf<double> { static constexpr DType value = DType::f64; using acc = double; };
template <> struct TypeOf<int32_t> { static constexpr DType value = DType::i32; using acc = int32_t; };
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
