// A stretch of GPU work that is recorded once and then launched as a whole (a CUDA graph). Used by the training step.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <type_traits>

namespace weft {

class Graph {
 public:
  Graph() = default;  // no work
  // Records what `work` puts on the compute stream; nothing of it runs yet. What it reads and writes must stay where it
  // is (so it allocates within a MemoryPool::Use), and it must not wait for the device: that throws Fault::device with
  // the call that did. Run the same work once before, so that kernels are loaded and algorithms chosen.
  explicit Graph(const std::function<void()>& work);
  explicit operator bool() const { return executable_ != nullptr; }
  void launch() const;

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy> executable_;
};

}  // namespace weft
