// Where a tensor lives. One process drives at most one GPU.
#pragma once
#include "engine/check.h"
#include "engine/dtype.h"

namespace weft {

enum class Device : uint8_t { cpu, cuda };
constexpr const char* name_of(Device d) { return d == Device::cpu ? "cpu" : "cuda"; }

// Calls f(Cpu{}) or f(Cuda{}): an op has one overload for each. A build without CUDA never instantiates the second.
template <class F>
decltype(auto) on_device(Device d, F&& f) {
#if WEFT_CUDA
  if (d == Device::cuda) return f(Cuda{});
#else
  check(d == Device::cpu, "this build has no CUDA side");
#endif
  return f(Cpu{});
}

// True where this build has a CUDA side, a GPU is there and this build has code for it.
bool cuda_available();
// Makes the GPU ready; throws Fault::device saying what is missing: no build support, no driver, no GPU, or a GPU
// whose architecture was not built for (with the CMake setting that builds for it).
void require_cuda();

}  // namespace weft
