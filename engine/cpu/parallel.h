// Threads for the CPU loops of ops.
#pragma once
#include <cstdint>
#include <functional>

namespace weft {

// Calls body(from, to) over disjoint ranges that cover [0, n), on the pool's threads and this one; returns when all are
// done. `grain` is the smallest range worth a thread. The ranges depend on the number of threads: do not sum across a
// range's elements into something shared. An exception of a body is thrown here. Nested calls run in line.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t from, int64_t to)>& body);

int cpu_threads();  // of the pool, this thread included: the cores this process may run on

}  // namespace weft
