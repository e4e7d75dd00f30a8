#include "engine/cuda/stream.h"

namespace weft {
namespace {
__global__ void probe() {}
}  // namespace

bool has_device_code() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

}  // namespace weft
