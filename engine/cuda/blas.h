// Matrix products on the GPU over cuBLASLt, on the compute stream. Used by matmul, grouped matmul and Muon.
#pragma once
#include "engine/cpu/gemm.h"

namespace weft {

// f32 is true f32 (no TF32); bf16 keeps its sums in f32. An algorithm is chosen per (shape, layout, types) on first use
// and kept. Throws Fault::device with the product's shape when cuBLASLt refuses it.
void gemm(Cuda, const Gemm& g);

// How an algorithm is chosen: by timing cuBLASLt's candidates (the fastest; its sums may be ordered differently in
// another process), or always its first one (the same in every process). Default: timed.
enum class AlgorithmChoice { timed, first };
void choose_algorithms(AlgorithmChoice choice);

}  // namespace weft
