// A run's scalars as a TensorBoard event file: TFRecord frames around Event messages of TensorFlow's event.proto.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace weft {

struct ScalarEvent {
  double wall_time;  // seconds
  int64_t step;
  std::vector<std::pair<std::string, float>> values;  // by tag
};

std::string tensorboard_events(std::span<const ScalarEvent> events);

uint32_t crc32c(std::string_view bytes);  // Castagnoli

}  // namespace weft
