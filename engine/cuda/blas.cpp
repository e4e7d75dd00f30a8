#include "engine/cuda/blas.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <memory>

#include "engine/allocator.h"
#include "engine/cuda/stream.h"
#include "engine/storage.h"

namespace weft {
namespace {

constexpr int64_t kWorkspace = 64 << 20;
constexpr int kCandidates = 8;
constexpr int kTimedRuns = 3;

AlgorithmChoice algorithm_choice = AlgorithmChoice::timed;

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

void multiply(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Gemm& g, void* out) {
  const float one = 1, beta = static_cast<float>(g.beta);
  blas_check(cublasLtMatmul(handle(), plan.description.get(), &one, g.b, plan.first.get(), g.a, plan.second.get(),
                            &beta, out, plan.result.get(), out, plan.result.get(), &algorithm, workspace(),
                            static_cast<size_t>(kWorkspace), compute_stream()), "product", g);
}

// The fastest of the candidates on this product's own operands. The result goes to a scratch matrix, since a product
// that adds to C must not run more than once on it.
cublasLtMatmulAlgo_t fastest(const Plan& plan, const Gemm& g,
                             const std::array<cublasLtMatmulHeuristicResult_t, kCandidates>& candidates, int found) {
  const MemoryScope scope(Category::workspace, "matmul");
  const int64_t elements = std::max<int64_t>((g.batch - 1) * g.stride_c, 0) + g.m * g.row_c();
  const Storage scratch(elements * size_of(g.out), Device::cuda);
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
  } events;
  int best = 0;
  float best_time = 0;
  for (int i = 0; i < found; ++i) {
    const cublasLtMatmulAlgo_t& algorithm = candidates[static_cast<size_t>(i)].algo;
    multiply(plan, algorithm, g, scratch.data());
    cuda_check(cudaEventRecord(events.start, compute_stream()), "cudaEventRecord");
    for (int run = 0; run < kTimedRuns; ++run) multiply(plan, algorithm, g, scratch.data());
    cuda_check(cudaEventRecord(events.stop, compute_stream()), "cudaEventRecord");
    cuda_check(cudaEventSynchronize(events.stop), "cudaEventSynchronize");
    float time = 0;
    cuda_check(cudaEventElapsedTime(&time, events.start, events.stop), "cudaEventElapsedTime");
    if (i == 0 || time < best_time) best = i, best_time = time;
  }
  return candidates[static_cast<size_t>(best)].algo;
}

// The largest power of two, at most 256, that divides the address of each matrix of a batch.
uint32_t alignment(const void* p, int64_t stride, DType type) {
  const uint64_t bits = reinterpret_cast<uint64_t>(p) | static_cast<uint64_t>(stride * size_of(type)) | 256;
  return uint32_t{1} << std::countr_zero(bits);
}
uint32_t alignment_a(const Gemm& g) { return alignment(g.a, g.stride_a, g.dtype); }
uint32_t alignment_b(const Gemm& g) { return alignment(g.b, g.stride_b, g.dtype); }
uint32_t alignment_c(const Gemm& g) { return alignment(g.c, g.stride_c, g.out); }

Plan make_plan(const Gemm& g) {
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
  const bool timed = algorithm_choice == AlgorithmChoice::timed && found > 1 && capture == cudaStreamCaptureStatusNone;
  plan.algorithm = timed ? fastest(plan, g, candidates, found) : candidates[0].algo;
  return plan;
}

using Key = std::array<int64_t, 18>;

Key key_of(const Gemm& g) {
  return {g.m, g.n, g.k, g.transpose_a, g.transpose_b, g.row_a(), g.row_b(), g.row_c(), static_cast<int64_t>(g.dtype),
          static_cast<int64_t>(g.out), g.bias != nullptr, g.beta != 0, g.batch, g.stride_a, g.stride_b, g.stride_c,
          int64_t{alignment_a(g)} << 32 | alignment_b(g), alignment_c(g)};
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

void gemm(Cuda, const Gemm& g) {
  check_gemm(g);
  check(g.k > 0 && (g.dtype == DType::f32 || g.dtype == DType::bf16),
        "a product on the GPU needs k > 0 and f32 or bf16: {}", g.str());
  if (g.m == 0 || g.n == 0 || g.batch == 0) return;
  const Key key = key_of(g);
  auto at = plans().find(key);
  if (at == plans().end()) at = plans().emplace(key, make_plan(g)).first;
  const Plan& plan = at->second;
  if (g.bias)
    blas_check(cublasLtMatmulDescSetAttribute(plan.description.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias,
                                              sizeof g.bias), "bias", g);
  multiply(plan, plan.algorithm, g, g.c);
}

}  // namespace weft
