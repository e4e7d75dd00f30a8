// What to read about an allocator's memory: who held it at the peak, and event by event. train_exp1 --memory-report
// writes both into the run folder.
#pragma once
#include <string>

#include "engine/allocator.h"

namespace weft {

// Tables of text: requested, allocated and reserved memory now and at their peaks; the peak by category and by layer
// (the largest `layers`, the rest summed); both pools and how fragmented what they have free is.
std::string memory_report(const CachingAllocator& allocator, int layers = 20);

// 1 - largest free block / all that is free: 0 when one block has it all, or nothing is free.
double fragmentation(const MemoryStats& stats);

// The recorded events as CSV, oldest first: sequence,bytes,category,layer,allocated.
std::string timeline_csv(const CachingAllocator& allocator);

}  // namespace weft
