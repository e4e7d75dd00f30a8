#include "engine/device.h"

#include <string>
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

// Why the GPU cannot be used; empty when it can.
std::string cuda_problem() {
#if WEFT_CUDA
  int count = 0, device = 0, major = 0, minor = 0;
  if (const cudaError_t e = cudaGetDeviceCount(&count); e != cudaSuccess || count == 0)
    return fmt::format("no usable NVIDIA GPU was found: {}", e == cudaSuccess ? "none is there" : cudaGetErrorString(e));
  if (const cudaError_t e = cudaFree(nullptr); e != cudaSuccess)
    return fmt::format("the GPU could not be started: {}", cudaGetErrorString(e));
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!has_device_code())
    return fmt::format("the GPU has architecture {0}{1}, this build has code for {2}: configure again with "
                       "-DCMAKE_CUDA_ARCHITECTURES={0}{1}", major, minor, WEFT_CUDA_ARCHS);
  return "";
#else
  return "this build has no CUDA side: configure with -DWEFT_CUDA=ON where nvcc is installed";
#endif
}

const std::string& problem() {
  static const std::string text = cuda_problem();
  return text;
}

}  // namespace

bool cuda_available() { return problem().empty(); }

void require_cuda() {
  if (!problem().empty()) fail(Fault::device, "--device cuda: {}", problem());
}

}  // namespace weft
