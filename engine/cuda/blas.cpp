#include "engine/cuda/blas.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "engine/algorithm_file.h"
#include "engine/allocator.h"
#include "engine/cuda/stream.h"
#include "engine/storage.h"

namespace weft {
namespace {

constexpr int64_t kWorkspace = 64 << 20;
constexpr int kCandidates = 24;

AlgorithmChoice algorithm_choice = AlgorithmChoice::timed;
std::optional<AlgorithmFile> algorithm_file;

void blas_check(cublasStatus_t status, const char* what, const Gemm& g) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(Fault::device, "cuBLASLt: {} failed: {}, for the product {}", what, cublasLtGetStatusString(status), g.str());
}

cublasLtHandle_t handle() {
  static cublasLtHandle_t h = [] {
    cublasLtHandle_t created = nullptr;
    const cublasStatus_t status = cublasLtCreate(&created);
    if (status != CUBLAS_STATUS_SUCCESS)
      fail(Fault::device, "cuBLASLt could not start: {}", cublasLtGetStatusString(status));
    return created;
  }();
  return h;
}

void* workspace() {
  static Storage storage = [] {
    const MemoryScope scope(Category::workspace, "matmul");
    return Storage(kWorkspace, Device::cuda);
  }();
  return storage.data();
}

cudaDataType_t cuda_type(DType t) { return t == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F; }

template <auto kDestroy>
struct Destroy {
  template <class T>
  void operator()(T* p) const {
    kDestroy(p);
  }
};
using Description = std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroy<cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroy<cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Destroy<cublasLtMatmulPreferenceDestroy>>;

// cuBLASLt is column-major: a row-major C [m, n] is its [n, m], so it is asked for C^T = op(B)^T op(A)^T.
struct Plan {
  Description description;
  Layout first, second, result;  // of b, a and c
  cublasLtMatmulAlgo_t algorithm;
};

Layout layout(const Gemm& g, DType type, int64_t rows, int64_t columns, int64_t pitch, int64_t stride) {
  cublasLtMatrixLayout_t made = nullptr;
  blas_check(cublasLtMatrixLayoutCreate(&made, cuda_type(type), static_cast<uint64_t>(columns),
                                        static_cast<uint64_t>(rows), pitch), "layout", g);
  Layout owned(made);
  const int32_t batch = static_cast<int32_t>(g.batch);
  const auto set = [&](cublasLtMatrixLayoutAttribute_t attribute, const auto& value) {
    blas_check(cublasLtMatrixLayoutSetAttribute(made, attribute, &value, sizeof value), "layout", g);
  };
  set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batch);
  set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
  return owned;
}

cublasStatus_t try_multiply(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Gemm& g, void* out) {
  const float one = 1, beta = static_cast<float>(g.beta);
  return cublasLtMatmul(handle(), plan.description.get(), &one, g.b, plan.first.get(), g.a, plan.second.get(), &beta,
                        out, plan.result.get(), out, plan.result.get(), &algorithm, workspace(),
                        static_cast<size_t>(kWorkspace), compute_stream());
}

struct Events {
  cudaEvent_t start = nullptr, stop = nullptr;
  Events() {
    cuda_check(cudaEventCreate(&start), "cudaEventCreate");
    cuda_check(cudaEventCreate(&stop), "cudaEventCreate");
  }
  ~Events() {
    cudaEventDestroy(start);
    cudaEventDestroy(stop);
  }
  // Milliseconds of one of `runs` calls of f.
  template <class F>
  float time(int runs, const F& f) {
    cuda_check(cudaEventRecord(start, compute_stream()), "cudaEventRecord");
    for (int run = 0; run < runs; ++run) f();
    cuda_check(cudaEventRecord(stop, compute_stream()), "cudaEventRecord");
    cuda_check(cudaEventSynchronize(stop), "cudaEventSynchronize");
    float total = 0;
    cuda_check(cudaEventElapsedTime(&total, start, stop), "cudaEventElapsedTime");
    return total / static_cast<float>(runs);
  }
};

// The fastest of the candidates on this product's own operands: all once briefly, then the best few in turns, by their
// medians. A product that adds to C must not run more than once on it, so it goes to a scratch matrix.
cublasLtMatmulAlgo_t fastest(const Plan& plan, const Gemm& g, const cublasLtMatmulHeuristicResult_t* candidates,
                             int found) {
  constexpr size_t kFinalists = 5;
  constexpr int kRounds = 7;
  constexpr float kRoundMs = 0.5f;  // of a finalist's runs in one round
  std::optional<Storage> scratch;
  if (g.beta != 0) {
    const MemoryScope scope(Category::workspace, "matmul");
    const int64_t elements = std::max<int64_t>((g.batch - 1) * g.stride_c, 0) + g.m * g.row_c();
    scratch.emplace(elements * size_of(g.out), Device::cuda);
    cuda_check(cudaMemsetAsync(scratch->data(), 0, static_cast<size_t>(elements * size_of(g.out)), compute_stream()),
               "cudaMemsetAsync");
  }
  void* const out = scratch ? scratch->data() : g.c;
  Events events;
  struct Contender {
    cublasLtMatmulAlgo_t algorithm;
    float first;
    std::vector<float> times = {};
  };
  std::vector<Contender> contenders;
  for (int i = 0; i < found; ++i) {
    const cublasLtMatmulAlgo_t& algorithm = candidates[i].algo;
    if (try_multiply(plan, algorithm, g, out) != CUBLAS_STATUS_SUCCESS) continue;
    contenders.push_back({algorithm, events.time(2, [&] { try_multiply(plan, algorithm, g, out); })});
  }
  if (contenders.empty()) fail(Fault::device, "cuBLASLt ran none of its algorithms for the product {}", g.str());
  std::stable_sort(contenders.begin(), contenders.end(),
                   [](const Contender& a, const Contender& b) { return a.first < b.first; });
  contenders.resize(std::min(contenders.size(), kFinalists), contenders.front());
  const int runs = std::clamp(static_cast<int>(kRoundMs / std::max(contenders.front().first, 1e-3f)), 1, 50);
  for (int round = 0; round < kRounds; ++round)
    for (Contender& c : contenders)
      c.times.push_back(events.time(runs, [&] { try_multiply(plan, c.algorithm, g, out); }));
  const auto median = [](Contender& c) {
    std::nth_element(c.times.begin(), c.times.begin() + kRounds / 2, c.times.end());
    return c.times[kRounds / 2];
  };
  size_t best = 0;
  for (size_t i = 1; i < contenders.size(); ++i)
    if (median(contenders[i]) < median(contenders[best])) best = i;
  return contenders[best].algorithm;
}

// The largest power of two, at most 256, that divides the address of each matrix of a batch.
uint32_t alignment(const void* p, int64_t stride, DType type) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p) | static_cast<uint64_t>(stride * size_of(type)) | 256;
  return uint32_t{1} << std::countr_zero(bits);
}
uint32_t alignment_a(const Gemm& g) { return alignment(g.a, g.stride_a, g.dtype); }
uint32_t alignment_b(const Gemm& g) { return alignment(g.b, g.stride_b, g.dtype); }
uint32_t alignment_c(const Gemm& g) { return alignment(g.c, g.stride_c, g.out); }

using Key = AlgorithmFile::Product;

Key key_of(const Gemm& g) {
  return {g.m, g.n, g.k, g.transpose_a, g.transpose_b, g.row_a(), g.row_b(), g.row_c(), static_cast<int64_t>(g.dtype),
          static_cast<int64_t>(g.out), g.bias != nullptr, g.beta != 0, g.batch, g.stride_a,
          g.stride_b, g.stride_c, int64_t{alignment_a(g)} << 32 | alignment_b(g), alignment_c(g)};
}

// The file's choice for this product, where there is one and this library still takes it.
std::optional<cublasLtMatmulAlgo_t> kept_choice(const Plan& plan, const Key& key) {
  const AlgorithmFile::Algorithm* const words = algorithm_file ? algorithm_file->find(key) : nullptr;
  if (!words) return std::nullopt;
  cublasLtMatmulAlgo_t algorithm;
  static_assert(sizeof algorithm == sizeof *words);
  std::memcpy(&algorithm, words, sizeof algorithm);
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle(), plan.description.get(), plan.first.get(), plan.second.get(), plan.result.get(),
                              plan.result.get(), &algorithm, &result);
  if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > static_cast<size_t>(kWorkspace)) return std::nullopt;
  return algorithm;
}

Plan make_plan(const Gemm& g, const Key& key) {
  Plan plan;
  cublasLtMatmulDesc_t description = nullptr;
  blas_check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F), "description", g);
  plan.description.reset(description);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    blas_check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value), "description", g);
  };
  const cublasOperation_t first = g.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t second = g.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  set(CUBLASLT_MATMUL_DESC_TRANSA, first);
  set(CUBLASLT_MATMUL_DESC_TRANSB, second);
  if (g.bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const int32_t type = cuda_type(g.dtype);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
  }
  plan.first = g.transpose_b ? layout(g, g.dtype, g.n, g.k, g.row_b(), g.stride_b)
                             : layout(g, g.dtype, g.k, g.n, g.row_b(), g.stride_b);
  plan.second = g.transpose_a ? layout(g, g.dtype, g.k, g.m, g.row_a(), g.stride_a)
                              : layout(g, g.dtype, g.m, g.k, g.row_a(), g.stride_a);
  plan.result = layout(g, g.out, g.m, g.n, g.row_c(), g.stride_c);
  const bool timed = algorithm_choice == AlgorithmChoice::timed;
  if (const auto kept = timed ? kept_choice(plan, key) : std::nullopt) {
    plan.algorithm = *kept;
    return plan;
  }

  cublasLtMatmulPreference_t preference = nullptr;
  blas_check(cublasLtMatmulPreferenceCreate(&preference), "preference", g);
  const Preference owned(preference);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    blas_check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value), "preference", g);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspace));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_b(g));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_a(g));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_c(g));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_c(g));

  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> candidates{};
  int found = 0;
  blas_check(cublasLtMatmulAlgoGetHeuristic(handle(), description, plan.first.get(), plan.second.get(),
                                            plan.result.get(), plan.result.get(), preference, kCandidates,
                                            candidates.data(), &found), "choice of an algorithm", g);
  if (found == 0) fail(Fault::device, "cuBLASLt has no algorithm for the product {}", g.str());
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(compute_stream(), &capture), "cudaStreamIsCapturing");
  plan.algorithm = candidates[0].algo;
  if (timed && capture == cudaStreamCaptureStatusNone) {
    plan.algorithm = fastest(plan, g, candidates.data(), found);
    AlgorithmFile::Algorithm words;
    std::memcpy(&words, &plan.algorithm, sizeof words);
    if (algorithm_file) algorithm_file->keep(key, words);
  }
  return plan;
}

std::map<Key, Plan>& plans() {
  static std::map<Key, Plan> made;
  return made;
}

}  // namespace

void choose_algorithms(AlgorithmChoice choice) {
  if (choice != algorithm_choice) plans().clear();
  algorithm_choice = choice;
}

std::string algorithm_machine() {
  cudaDeviceProp properties{};
  int device = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return fmt::format("{} cuBLASLt {}", properties.name, cublasLtGetVersion());
}

void keep_algorithms(const std::string& path) {
  algorithm_file.reset();
  plans().clear();
  if (!path.empty()) algorithm_file.emplace(path, algorithm_machine());
}

void gemm(Cuda, const Gemm& g) {
  check_gemm(g);
  check(g.k > 0 && (g.dtype == DType::f32 || g.dtype == DType::bf16),
        "a product on the GPU needs k > 0 and f32 or bf16: {}", g.str());
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  const Key key = key_of(g);
  auto at = plans().find(key);
  if (at == plans().end()) at = plans().emplace(key, make_plan(g, key)).first;
  const Plan& plan = at->second;
  if (g.bias)
    blas_check(cublasLtMatmulDescSetAttribute(plan.description.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias,
                                              sizeof g.bias), "bias", g);
  blas_check(try_multiply(plan, plan.algorithm, g, g.c), "product", g);
}

}  // namespace weft
