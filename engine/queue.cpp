#include "engine/queue.h"

#include <cstdlib>
#include <cstring>

#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

void* host_memory(int64_t bytes, Device device) {
  void* p = nullptr;
#if WEFT_CUDA
  if (device == Device::cuda) {
    cuda_check(cudaMallocHost(&p, static_cast<size_t>(bytes)), "cudaMallocHost");
    return p;
  }
#endif
  check(device == Device::cpu, "this build has no CUDA side");
  p = std::malloc(static_cast<size_t>(bytes));
  check(p != nullptr || bytes == 0, "{} bytes of host memory are there", bytes);
  return p;
}
void release_host_memory(void* p, Device device) {
#if WEFT_CUDA
  if (device == Device::cuda) {
    cudaFreeHost(p);
    return;
  }
#endif
  (void)device;
  std::free(p);
}
template <Device kDevice>
void release_of(void* p) {
  release_host_memory(p, kDevice);
}

void* new_event(Device device) {
#if WEFT_CUDA
  if (device == Device::cuda) {
    cudaEvent_t event = nullptr;
    cuda_check(cudaEventCreate(&event), "cudaEventCreate");
    return event;
  }
#endif
  (void)device;
  return nullptr;
}
void release_event(void* event) {
#if WEFT_CUDA
  cudaEventDestroy(static_cast<cudaEvent_t>(event));
#else
  (void)event;
#endif
}

}  // namespace

Staging::Staging(int64_t bytes, Device device)
    : memory_(host_memory(bytes, device), device == Device::cuda ? release_of<Device::cuda> : release_of<Device::cpu>) {}

void queue_copy(void* to, const void* from, int64_t bytes, Device device) {
#if WEFT_CUDA
  if (device == Device::cuda) {
    cuda_check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, compute_stream()),
               "cudaMemcpyAsync");
    return;
  }
#endif
  check(device == Device::cpu, "this build has no CUDA side");
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

Mark::Mark(Device device) : device_(device), event_(new_event(device), release_event) {}

void Mark::set() {
#if WEFT_CUDA
  if (device_ == Device::cuda) {
    cuda_check(cudaEventRecord(static_cast<cudaEvent_t>(event_.get()), compute_stream()), "cudaEventRecord");
    return;
  }
#endif
  at_ = std::chrono::steady_clock::now();
}

bool Mark::reached() const {
#if WEFT_CUDA
  if (device_ == Device::cuda) {
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(event_.get()));
    if (status == cudaErrorNotReady) return false;
    cuda_check(status, "cudaEventQuery");
  }
#endif
  return true;
}

void Mark::wait() const {
#if WEFT_CUDA
  if (device_ == Device::cuda)
    cuda_check(cudaEventSynchronize(static_cast<cudaEvent_t>(event_.get())), "cudaEventSynchronize");
#endif
}

double Mark::milliseconds_since(const Mark& earlier) const {
#if WEFT_CUDA
  if (device_ == Device::cuda) {
    float ms = 0;
    cuda_check(cudaEventElapsedTime(&ms, static_cast<cudaEvent_t>(earlier.event_.get()),
                                    static_cast<cudaEvent_t>(event_.get())), "cudaEventElapsedTime");
    return ms;
  }
#endif
  return std::chrono::duration<double, std::milli>(at_ - earlier.at_).count();
}

}  // namespace weft
