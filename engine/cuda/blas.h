// Matrix products on the GPU over cuBLASLt, on the compute stream. Used by matmul, linear_cross_entropy and Muon.
#pragma once
#include <string>

#include "engine/cpu/gemm.h"

namespace weft {

// f32 is true f32 (no TF32); bf16 keeps its sums in f32. An algorithm is chosen per (shape, layout, types) on first use
// and kept. Throws Fault::device with the product's shape when cuBLASLt refuses it.
void gemm(Cuda, const Gemm& g);

// How an algorithm is chosen: by timing cuBLASLt's candidates (the fastest; its sums may be ordered differently in
// another process, unless a file hands the choice on), or always its first one (the same in every process; no file is
// read). Default: timed. A product that is met first while a CUDA graph is captured takes the first one.
enum class AlgorithmChoice { timed, first };
void choose_algorithms(AlgorithmChoice choice);

// The file that hands timed choices to the next process (engine/algorithm_file.h). Default, and "": none.
void keep_algorithms(const std::string& path);
std::string algorithm_machine();  // what such a file's choices hold for: this GPU and this cuBLASLt

}  // namespace weft
