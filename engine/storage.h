// A block of device memory with an owner count; freed to the device's caching allocator with its last owner.
#pragma once
#include <cstdint>

#include "engine/device.h"

namespace weft {

class Storage {
 public:
  Storage(int64_t bytes, Device device);  // uninitialised; throws Fault::device when there is no more memory
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

 private:
  void* data_;
  int64_t bytes_;
  Device device_;
};

// Copies bytes between any two places, ordered with the compute stream. A copy that touches the CPU has finished when
// this returns.
void copy_bytes(void* to, Device to_device, const void* from, Device from_device, int64_t bytes);

}  // namespace weft
