// What a device does during a training step, item by item, and for which op: on a GPU every kernel, copy and fill, as
// CUPTI's activity records have them; on a CPU the time between the calls of engine/autograd.h's observer. Used by
// bench_step for its tables; nothing here is at work while steps are timed.
#pragma once
#include <string>
#include <vector>

#include "engine/autograd.h"

namespace weft {

// Whose an item is, in the words of engine/autograd.h's queued().
struct Owner {
  std::string name;
  Shape output;
  Work work = Work::forward;
};

constexpr const char* kOnCpu = "CPU loops";
struct Item {
  std::string name;           // of the kernel, shortened; kOnCpu on a CPU
  double start = 0, end = 0;  // ms
  Owner owner;
};

// Why no items can be recorded here; empty where they can.
std::string recording_problem(Device device);

// Runs `step` and returns what the device did, in order of start.
std::vector<Item> record_items(Device device, const std::function<void()>& step);

// Runs a step that queues its work without ops, as the replay of a captured one does. An item has the owner of the item
// of `eager` with the same name and the same place among those of that name.
std::vector<Item> record_replay(const std::vector<Item>& eager, const std::function<void()>& step);

// Time during which at least one item ran, in ms.
double busy_time(const std::vector<Item>& items);

}  // namespace weft
