// Copies a range of columns between row-major matrices: used by the ops that cut or join the last axis. Widths are in
// bytes, so one form serves every dtype; on a GPU a thread moves the widest word that all addresses allow.
#pragma once
#include <cstring>

#include "engine/cpu/parallel.h"
#include "engine/device.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {

// Columns of `width` bytes at `data`, whose rows lie `pitch` bytes apart.
struct Columns {
  char* data;
  int64_t pitch;
};

// Row r of `to` = row r / share of `from`.
inline void copy_columns(Cpu, int64_t rows, int64_t width, Columns to, Columns from, int64_t share = 1) {
  parallel_for(rows, 1024, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(to.data + r * to.pitch, from.data + r / share * from.pitch, static_cast<size_t>(width));
  });
}

#ifdef __CUDACC__
template <class Word>
__global__ void copy_columns_kernel(int64_t words, uint32_t row_words, Columns to, Columns from, int64_t share) {
  const int64_t i = element_index();
  if (i >= words) return;
  const int64_t row = i / row_words, column = i % row_words * static_cast<int64_t>(sizeof(Word));
  *reinterpret_cast<Word*>(to.data + row * to.pitch + column) =
      *reinterpret_cast<const Word*>(from.data + row / share * from.pitch + column);
}

inline void copy_columns(Cuda, int64_t rows, int64_t width, Columns to, Columns from, int64_t share = 1) {
  if (rows == 0 || width == 0) return;
  const auto bits = reinterpret_cast<uintptr_t>(to.data) | reinterpret_cast<uintptr_t>(from.data) |
                    static_cast<uintptr_t>(to.pitch | from.pitch | width);
  const auto copy = [&]<class Word>(Word) {
    const int64_t row_words = width / static_cast<int64_t>(sizeof(Word));
    check(row_words <= UINT32_MAX, "a row of {} bytes is too wide", width);
    launch_elements(copy_columns_kernel<Word>, rows * row_words, rows * row_words, static_cast<uint32_t>(row_words), to,
                    from, share);
  };
  if (bits % 16 == 0) copy(int4{});
  else if (bits % 8 == 0) copy(int2{});
  else if (bits % 4 == 0) copy(int{});
  else copy(short{});
}
#endif

}  // namespace weft
