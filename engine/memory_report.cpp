#include "engine/memory_report.h"

#include <algorithm>

#include "engine/check.h"

namespace weft {
namespace {

double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

double percent(int64_t part, int64_t whole) {
  return whole > 0 ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0;
}

double fragmentation(int64_t free, int64_t largest) {
  return free > 0 ? 1 - static_cast<double>(largest) / static_cast<double>(free) : 0;
}

// Quoted where CSV needs it.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

}  // namespace

double fragmentation(const MemoryStats& s) { return fragmentation(s.reserved - s.allocated - s.held, s.largest_free); }

std::string memory_report(const CachingAllocator& allocator, int layers) {
  const MemoryStats s = allocator.stats();
  std::string out = fmt::format("{:<28}{:>12}{:>12}\n", "memory (MiB)", "now", "peak");
  const auto row = [&](const char* name, int64_t now, int64_t peak) {
    out += fmt::format("{:<28}{:>12.2f}{:>12.2f}\n", name, mib(now), mib(peak));
  };
  row("requested by callers", s.requested, s.peak_requested);
  row("allocated, after rounding", s.allocated, s.peak_allocated);
  row("reserved from the device", s.reserved, s.peak_reserved);
  out += fmt::format("{} blocks handed out, {} segments taken from the device\n", s.allocations, s.device_allocations);
  if (s.held > 0) out += fmt::format("{:.2f} MiB of what is reserved are set aside for captured steps\n", mib(s.held));

  out += fmt::format("\n{:<28}{:>12}{:>8}{:>16}\n", "category", "at peak", "%", "its own peak");
  for (int c = 0; c < kCategories; ++c)
    out += fmt::format("{:<28}{:>12.2f}{:>8.1f}{:>16.2f}\n", name_of(static_cast<Category>(c)), mib(s.at_peak[c]),
                       percent(s.at_peak[c], s.peak_allocated), mib(s.peak[c]));

  const std::vector<LayerUse> uses = allocator.layers_at_peak();
  const size_t shown = std::min(uses.size(), static_cast<size_t>(std::max(layers, 0)));
  size_t width = 26;
  int64_t rest = 0;
  for (size_t i = 0; i < uses.size(); ++i)
    if (i < shown)
      width = std::max(width, uses[i].layer.size());
    else
      rest += uses[i].bytes;
  out += fmt::format("\n{:<{}}  {:<12}{:>12}{:>8}\n", "layer", width, "category", "at peak", "%");
  const auto layer_row = [&](const std::string& layer, const char* category, int64_t bytes) {
    out += fmt::format("{:<{}}  {:<12}{:>12.2f}{:>8.1f}\n", layer, width, category, mib(bytes),
                       percent(bytes, s.peak_allocated));
  };
  for (size_t i = 0; i < shown; ++i)
    layer_row(uses[i].layer.empty() ? "(no layer)" : uses[i].layer, name_of(uses[i].category), uses[i].bytes);
  if (shown < uses.size()) layer_row(fmt::format("({} more)", uses.size() - shown), "", rest);

  out += fmt::format("\n{:<16}{:>12}{:>12}{:>12}{:>14}{:>16}\n", "pool now", "allocated", "reserved", "free blocks",
                     "largest free", "fragmentation");
  const auto pool_row = [&](const char* name, const PoolStats& p) {
    out += fmt::format("{:<16}{:>12.2f}{:>12.2f}{:>12}{:>14.2f}{:>15.1f}%\n", name, mib(p.allocated), mib(p.reserved),
                       p.free_blocks, mib(p.largest_free),
                       100 * fragmentation(p.reserved - p.allocated - p.held, p.largest_free));
  };
  pool_row("up to 1 MiB", s.small);
  pool_row("larger", s.large);
  pool_row("both", {s.allocated, s.reserved, s.held, s.small.free_blocks + s.large.free_blocks, s.largest_free});
  return out;
}

std::string timeline_csv(const CachingAllocator& allocator) {
  std::string out = "sequence,bytes,category,layer,allocated\n";
  for (const MemoryEvent& e : allocator.timeline())
    out += fmt::format("{},{},{},{},{}\n", e.sequence, e.bytes, name_of(e.category), csv_field(e.layer), e.allocated);
  return out;
}

}  // namespace weft
