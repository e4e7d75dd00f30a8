#include "engine/storage.h"

#include <cstring>

#include "engine/allocator.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {

Storage::Storage(int64_t bytes, Device device)
    : data_(allocator(device).allocate(bytes)), bytes_(bytes), device_(device) {}

Storage::~Storage() { allocator(device_).free(data_); }

void copy_bytes(void* to, Device to_device, const void* from, Device from_device, int64_t bytes) {
  if (bytes == 0) return;
  if (to_device == Device::cpu && from_device == Device::cpu) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
#if WEFT_CUDA
  cuda_check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, compute_stream()), "copy");
  if (to_device != from_device) synchronize();
#else
  check(false, "this build has no CUDA side");
#endif
}

}  // namespace weft
