#include "engine/cpu/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace weft {
namespace {

thread_local bool inside = false;

class Pool {
 public:
  Pool() {
    for (int i = 1; i < cpu_threads(); ++i) threads_.emplace_back([this](std::stop_token stop) { serve(stop); });
  }
  ~Pool() {
    for (auto& t : threads_) t.request_stop();
    wake_.notify_all();
  }

  void run(int64_t n, int64_t chunk, const std::function<void(int64_t, int64_t)>& body) {
    const std::lock_guard one_job(job_mutex_);
    {
      const std::lock_guard lock(mutex_);
      body_ = &body;
      n_ = n;
      chunk_ = chunk;
      next_ = 0;
      busy_ = static_cast<int>(threads_.size());
      failure_ = nullptr;
      ++generation_;
    }
    wake_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void work() {
    inside = true;
    for (;;) {
      const int64_t from = next_.fetch_add(chunk_);
      if (from >= n_) break;
      try {
        (*body_)(from, std::min(n_, from + chunk_));
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
    }
    inside = false;
  }
  void serve(const std::stop_token& stop) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        if (!wake_.wait(lock, stop, [&] { return generation_ != seen; })) return;
        seen = generation_;
      }
      work();
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable_any wake_, done_;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t n_ = 0, chunk_ = 1;
  std::atomic<int64_t> next_{0};
  int busy_ = 0;
  uint64_t generation_ = 0;
  std::exception_ptr failure_;
  std::vector<std::jthread> threads_;
};

}  // namespace

int cpu_threads() {
  static const int count = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
  }();
  return count;
}

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  const int threads = cpu_threads();
  if (inside || threads == 1 || n <= grain) return body(0, n);
  static Pool pool;
  pool.run(n, std::max(grain, (n + threads * 4 - 1) / (threads * 4)), body);
}

}  // namespace weft
