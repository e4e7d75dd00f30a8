#include "engine/cuda/graph.h"

#include "engine/cuda/stream.h"

namespace weft {
namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Recording = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

// Relaxed, so that the allocator may still ask the device for a segment.
Recording record_work(const std::function<void()>& work) {
  cuda_check(cudaStreamBeginCapture(compute_stream(), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(compute_stream(), &graph);
    cudaGetLastError();
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  cuda_check(cudaStreamEndCapture(compute_stream(), &graph), "cudaStreamEndCapture");
  return Recording(graph);
}

}  // namespace

Graph::Graph(const std::function<void()>& work) {
  Recording recording;
  try {
    recording = record_work(work);
  } catch (const Error& e) {
    fail(e.fault(), "while work was being recorded as a CUDA graph: {}", e.what());
  }
  cudaGraphExec_t executable = nullptr;
  cuda_check(cudaGraphInstantiate(&executable, recording.get(), 0), "cudaGraphInstantiate");
  executable_.reset(executable);
  cuda_check(cudaGraphUpload(executable, compute_stream()), "cudaGraphUpload");
}

void Graph::launch() const { cuda_check(cudaGraphLaunch(executable_.get(), compute_stream()), "cudaGraphLaunch"); }

}  // namespace weft
