// A device's queue of work as the host sees it: memory that copies run beside, copies that are not waited for, and marks
// between pieces of work. Used by the training step, which never stops the host. On the CPU there is no queue:
// everything has happened when a call returns.
#pragma once
#include <chrono>
#include <memory>

#include "engine/device.h"

namespace weft {

// Host memory for queue_copy: page-locked where the device is a GPU.
class Staging {
 public:
  Staging(int64_t bytes, Device device);
  template <class T = void>
  T* at(int64_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + offset);
  }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_;
};

// Copies when the device's queue comes to it, between memory of the device and a Staging: whoever writes or frees
// either must know by a Mark that it is done.
void queue_copy(void* to, const void* from, int64_t bytes, Device device);

// A place in the queue: set() puts it behind all work queued so far.
class Mark {
 public:
  explicit Mark(Device device);
  void set();
  bool reached() const;  // never set counts as reached
  void wait() const;     // until it is reached
  // What the device took from `earlier` to here; both must be reached.
  double milliseconds_since(const Mark& earlier) const;

 private:
  Device device_;
  std::chrono::steady_clock::time_point at_{};   // of the CPU
  std::unique_ptr<void, void (*)(void*)> event_;  // of the GPU
};

}  // namespace weft
