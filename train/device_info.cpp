#include "train/device_info.h"

#include <fstream>
#include <string_view>

#include "engine/cpu/parallel.h"
#include "train/algorithms.h"
#if WEFT_CUDA
#include <cublasLt.h>

#include "engine/cuda/stream.h"
#endif

namespace weft {
namespace {

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

#if WEFT_CUDA
std::string gpu_name() {
  cudaDeviceProp properties{};
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}
#endif

}  // namespace

std::string device_name(Device device) {
#if WEFT_CUDA
  if (device == Device::cuda) return gpu_name();
#endif
  return device == Device::cpu ? fmt::format("{} ({} threads)", cpu_name(), cpu_threads()) : "";
}

std::optional<double> peak_flops(Device device, DType precision) {
  if (device == Device::cpu) return std::nullopt;
  // {how the GPU's name ends, bf16 with f32 sums, f32}; TFLOP/s, dense.
  struct Row {
    std::string_view name;
    double bf16, f32;
  };
  static constexpr Row kRows[] = {
      {"H200", 989, 67},             {"H100 80GB HBM3", 989, 67},  {"H100 PCIe", 756, 51},
      {"A100-SXM4-40GB", 312, 19.5}, {"A100-SXM4-80GB", 312, 19.5}, {"A100-PCIE-40GB", 312, 19.5},
      {"A100 80GB PCIe", 312, 19.5}, {"L40S", 362, 91.6},          {"RTX 4090", 165.2, 82.6},
      {"RTX 3090", 71, 35.6}};
  const std::string name = device_name(device);
  for (const Row& row : kRows)
    if (name.ends_with(row.name)) return 1e12 * (precision == DType::bf16 ? row.bf16 : row.f32);
  return std::nullopt;
}

Json environment() {
  Json env{{"weft_version", WEFT_VERSION}, {"commit", WEFT_COMMIT},  {"compiler", __VERSION__},
           {"processor", cpu_name()},      {"threads", cpu_threads()}, {"cudnn", nullptr}, {"nccl", nullptr}};
#ifdef WEFT_CUDNN_VERSION
  env["cudnn"] = WEFT_CUDNN_VERSION;
#endif
#ifdef WEFT_NCCL_VERSION
  env["nccl"] = WEFT_NCCL_VERSION;
#endif
#if WEFT_CUDA
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  env["cuda_runtime"] = fmt::format("{}.{}", runtime / 1000, runtime % 1000 / 10);
  env["cuda_driver"] = fmt::format("{}.{}", driver / 1000, driver % 1000 / 10);
  env["cublas"] = cublasLtGetVersion();
  env["gpu"] = cuda_available() ? Json(gpu_name()) : Json(nullptr);
#endif
  env.update(algorithm_settings());
  return env;
}

void wait_for(Device device) {
#if WEFT_CUDA
  if (device == Device::cuda) synchronize();
#else
  (void)device;
#endif
}

}  // namespace weft
