// What the run ran on, for env.json, results.json and the MFU.
#pragma once
#include <optional>
#include <string>

#include "engine/device.h"
#include "train/run_folder.h"

namespace weft {

std::string device_name(Device device);
// Dense matrix rate of the device in FLOP/s from the vendor's data sheet; nothing where it is not known.
std::optional<double> peak_flops(Device device, DType precision);
// Versions of weft, the compiler, CUDA and its driver, the processor and the GPU.
Json environment();
void wait_for(Device device);  // until all queued work is done

}  // namespace weft
