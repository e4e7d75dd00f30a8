// A file of the algorithms that were chosen for matrix products by timing, so that the next process needs no timing and
// takes the same ones. Used by engine/cuda/blas.cpp.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>

namespace weft {

class AlgorithmFile {
 public:
  using Product = std::array<int64_t, 18>;   // shape, layout, types
  using Algorithm = std::array<uint64_t, 8>;  // what cuBLASLt calls one, opaque

  // Reads the file where there is one. `machine` is what its choices hold for (one line: the GPU and the library). A
  // file of another machine, or a damaged one, is passed over with a note on stderr and replaced by the next keep().
  AlgorithmFile(const std::string& path, const std::string& machine);
  const Algorithm* find(const Product& product) const;  // nullptr: not known
  // Adds a choice and replaces the file whole (written beside it, then renamed). Where that fails, a note on stderr
  // says so once, and the choices live as long as the process.
  void keep(const Product& product, const Algorithm& algorithm);

 private:
  std::string path_, machine_;
  std::map<Product, Algorithm> known_;
  bool writable_ = true;
};

// gemm_<machine>.txt in the user's cache folder: $XDG_CACHE_HOME/weft or ~/.cache/weft; "" where there is neither.
std::string default_algorithm_file(const std::string& machine);

}  // namespace weft
