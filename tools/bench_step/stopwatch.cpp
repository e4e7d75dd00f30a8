#include "tools/bench_step/stopwatch.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kRuns = 12;

// The fastest of some runs, in seconds.
double fastest(Device device, const std::function<void()>& work) {
  work();
  Stopwatch watch(device);
  watch.mark();
  for (int i = 0; i < kRuns; ++i) work(), watch.mark();
  const std::vector<double> ms = watch.intervals();
  return 1e-3 * *std::min_element(ms.begin(), ms.end());
}

}  // namespace

struct Stopwatch::Marks {
  explicit Marks(Device d) : device(d) {}
  Device device;
  std::vector<Clock::time_point> times;
#if WEFT_CUDA
  std::vector<cudaEvent_t> events;
#endif
};

Stopwatch::Stopwatch(Device device) : marks_(new Marks(device)) {}

Stopwatch::~Stopwatch() {
#if WEFT_CUDA
  for (const cudaEvent_t event : marks_->events) cudaEventDestroy(event);
#endif
}

void Stopwatch::mark() {
#if WEFT_CUDA
  if (marks_->device == Device::cuda) {
    cudaEvent_t& event = marks_->events.emplace_back();
    cuda_check(cudaEventCreate(&event), "cudaEventCreate");
    return cuda_check(cudaEventRecord(event, compute_stream()), "cudaEventRecord");
  }
#endif
  marks_->times.push_back(Clock::now());
}

std::vector<double> Stopwatch::intervals() const {
  std::vector<double> ms;
#if WEFT_CUDA
  if (marks_->device == Device::cuda) synchronize();
  for (size_t i = 1; i < marks_->events.size(); ++i) {
    float interval = 0;
    cuda_check(cudaEventElapsedTime(&interval, marks_->events[i - 1], marks_->events[i]), "cudaEventElapsedTime");
    ms.push_back(interval);
  }
#endif
  for (size_t i = 1; i < marks_->times.size(); ++i)
    ms.push_back(std::chrono::duration<double, std::milli>(marks_->times[i] - marks_->times[i - 1]).count());
  return ms;
}

double matrix_rate(Device device, DType dtype) {
  const int64_t n = device == Device::cuda ? 8192 : 1024;
  const Tensor a = Tensor::empty({n, n}, dtype, device), b = Tensor::like(a);
  fill_normal(a, 1, {1, 1}), fill_normal(b, 1, {1, 2});
  const double flops = 2 * std::pow(static_cast<double>(n), 3);
  double rate = 0;
  for (const int64_t rows : {n, 2 * n / 3, n / 2})  // the library's choice for a single size may be a poor one
    for (const Transpose transpose : {Transpose::none, Transpose::b}) {
      const Tensor part = a.rows(0, rows);
      const double seconds = fastest(device, [&] { matmul(part, b, transpose); });
      rate = std::max(rate, flops * static_cast<double>(rows) / static_cast<double>(n) / seconds);
    }
  return rate;
}

double copy_rate(Device device) {
  const int64_t bytes = int64_t{1} << (device == Device::cuda ? 30 : 26);
  const Tensor from = Tensor::zeros({bytes / 4}, DType::f32, device), to = Tensor::zeros({bytes / 4}, DType::f32, device);
  char *const source = static_cast<char*>(from.raw()), *const target = static_cast<char*>(to.raw());
  const double seconds = fastest(device, [&] {
#if WEFT_CUDA
    if (device == Device::cuda)
      return cuda_check(cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                                        compute_stream()), "cudaMemcpyAsync");
#endif
    parallel_for(bytes, 1 << 20, [&](int64_t first, int64_t last) {
      std::memcpy(target + first, source + first, static_cast<size_t>(last - first));
    });
  });
  return 2 * static_cast<double>(bytes) / seconds;
}

}  // namespace weft
