#include "tools/report/figures.h"

#include <fmt/core.h>

#include <algorithm>
#include <cctype>
#include <map>

#include "tools/report/chart.h"
#include "tools/report/comparison.h"

namespace weft {
namespace {

// The mean over the complete runs of one part of something.
Value part_mean(const Results& r, const std::string& config, Parts Run::*parts, const std::string& part) {
  std::vector<double> values;
  for (const Run& run : r.runs)
    if (run.experiment == config && run.complete)
      for (const auto& [name, amount] : run.*parts)
        if (name == part) values.push_back(amount);
  return values.empty() ? Value() : Value(summarise(values).mean);
}

// A table of parts and their sum, a row for each configuration, and the same as stacks.
struct Breakdown {
  std::vector<std::string> parts;
  Table table;
  std::vector<Stack> stacks;
};
Breakdown break_down(const Results& r, Parts Run::*member, double scale) {
  Breakdown b{{}, {{"Experiment"}, {}}, {}};
  for (const Run& run : r.runs)
    for (const auto& entry : run.*member)
      if (std::find(b.parts.begin(), b.parts.end(), entry.first) == b.parts.end()) b.parts.push_back(entry.first);
  b.table.head.insert(b.table.head.end(), b.parts.begin(), b.parts.end());
  b.table.head.push_back("sum");
  for (const std::string& config : r.setup.configs) {
    std::vector<std::string> row{code(config)};
    Stack& stack = b.stacks.emplace_back(Stack{config, {}});
    Value sum;
    for (const std::string& part : b.parts) {
      const Value amount = part_mean(r, config, member, part);
      if (amount) sum = sum.value_or(0) + *amount;
      stack.parts.push_back(scale * amount.value_or(0));
      row.push_back(amount ? shown(scale * *amount, 3) : "missing");
    }
    row.push_back(sum ? shown(scale * *sum, 3) : "missing");
    b.table.rows.push_back(std::move(row));
  }
  return b;
}

std::vector<std::vector<double>> mean_load(const Results& r, const std::string& config) {
  std::vector<std::vector<double>> sum;
  double runs = 0;
  for (const Run& run : r.runs) {
    if (run.experiment != config || !run.complete || run.expert_load.empty()) continue;
    if (sum.empty()) sum.assign(run.expert_load.size(), std::vector<double>(run.expert_load[0].size()));
    if (sum.size() != run.expert_load.size() || sum[0].size() != run.expert_load[0].size()) continue;
    for (size_t layer = 0; layer < sum.size(); ++layer)
      for (size_t e = 0; e < sum[layer].size(); ++e) sum[layer][e] += run.expert_load[layer][e];
    ++runs;
  }
  for (auto& layer : sum)
    for (double& share : layer) share /= runs;
  return sum;
}

// The mean over the seeds of a configuration at every micro-step that all of them reached, lowest to highest as band.
// Complete runs speak for the configuration; where none is complete, what there is.
Series curve(const Results& r, const std::string& config, std::vector<Point> Curves::*kind, Value Point::*x, size_t most_points) {
  std::vector<const std::vector<Point>*> seeds;
  for (const bool complete : {true, false}) {
    for (int64_t seed : r.setup.seeds) {
      const auto found = r.curves.find({config, seed});
      const Run* run = r.find(config, seed);
      if (found != r.curves.end() && (run && run->complete) == complete && !(found->second.*kind).empty())
        seeds.push_back(&(found->second.*kind));
    }
    if (!seeds.empty()) break;
  }
  struct Sample {
    double x = 0, y = 0, low = 1e300, high = -1e300;
    size_t n = 0;
  };
  std::map<int64_t, Sample> samples;
  for (const auto* points : seeds)
    for (const Point& p : *points) {
      const Value at = x ? p.*x : Value(static_cast<double>(p.micro_step));
      if (!at) continue;
      Sample& s = samples[p.micro_step];
      s.x += *at, s.y += *p.loss, s.low = std::min(s.low, *p.loss), s.high = std::max(s.high, *p.loss), ++s.n;
    }
  std::vector<ChartPoint> all;
  for (const auto& [step, s] : samples)
    if (s.n == seeds.size()) all.push_back({s.x / static_cast<double>(s.n), s.y / static_cast<double>(s.n), s.low, s.high});
  std::sort(all.begin(), all.end(), [](const ChartPoint& a, const ChartPoint& b) { return a.x < b.x; });

  Series series{config, {}};
  const size_t together = (all.size() + most_points - 1) / most_points;
  for (size_t i = 0; i < all.size(); i += together) {
    const size_t end = std::min(all.size(), i + together);
    ChartPoint mean{0, 0, all[i].low, all[i].high};
    for (size_t k = i; k < end; ++k) {
      mean.x += all[k].x / static_cast<double>(end - i), mean.y += all[k].y / static_cast<double>(end - i);
      mean.low = std::min(mean.low, all[k].low), mean.high = std::max(mean.high, all[k].high);
    }
    series.points.push_back(mean);
  }
  return series;
}

}  // namespace

void add_figure(Document& out, const std::string& file, const std::string& caption, const std::string& svg) {
  if (!svg.empty()) out.push_back(Figure{file, caption, svg});
}

void add_parameters(Document& out, const Results& r) {
  Breakdown b = break_down(r, &Run::parameters_by_part, 1e-6);
  if (b.parts.empty()) return;
  out.push_back(Heading{3, "Parameters by part (M)"});
  out.push_back(std::move(b.table));
  out.push_back(Paragraph{"Millions of parameters. The configurations differ in attention and its norms alone; the embedding is also the "
                          "output layer."});
}

void add_memory(Document& out, const Results& r, const std::string& prefix) {
  Breakdown b = break_down(r, &Run::peak_by_category, 1);
  out.push_back(Heading{3, "Peak memory by category (GB)"});
  if (b.parts.empty()) {
    out.push_back(Paragraph{"Not recorded."});
    return;
  }
  out.push_back(std::move(b.table));
  out.push_back(Paragraph{"What each category held at the moment of the peak, in 10⁹ bytes, mean over the complete seeds."});
  add_figure(out, prefix + "memory.svg", "Memory at the peak, by category (GB).",
             stack_chart(b.stacks, b.parts, "GB at the moment of the peak"));
}

// At most 250 points over a step, each the highest of its events: no peak gets lost. The band reaches to the lowest.
void add_timeline(Document& out, const Results& r, const std::string& prefix) {
  constexpr size_t kMostPoints = 250;
  std::vector<Series> series;
  std::string seeds;
  for (const std::string& config : r.setup.configs) {
    Series& s = series.emplace_back(Series{config, {}});  // also where there is none: a configuration keeps its colour
    const auto found = r.timelines.find(config);
    if (found == r.timelines.end()) continue;
    const std::vector<double>& gb = found->second.allocated_gb;
    const size_t together = (gb.size() + kMostPoints - 1) / kMostPoints;
    for (size_t i = 0; i < gb.size(); i += together) {
      const size_t end = std::min(gb.size(), i + together);
      const auto [low, high] = std::minmax_element(gb.begin() + static_cast<int64_t>(i), gb.begin() + static_cast<int64_t>(end));
      s.points.push_back({100.0 * static_cast<double>(end) / static_cast<double>(gb.size()), *high, *low, *high});
    }
    if (!gb.empty()) seeds += fmt::format("{}{} with seed {} ({} events)", seeds.empty() ? "" : ", ", code(config), found->second.seed, gb.size());
  }
  if (seeds.empty()) return;
  out.push_back(Heading{3, "Memory during one optimizer step"});
  add_figure(out, prefix + "memory_timeline.svg",
             fmt::format("Memory handed out by the allocator after each allocation and release, over the share of the step's events that "
                         "are past (their order, not their time): {}. The band spans the events that share a point.", seeds),
             line_chart(series, "% of the step's events", "allocated (GB)", 0));
}

void add_expert_load(Document& out, const Results& r, const std::string& prefix) {
  Table table{{"Experiment", "Layers", "Experts", "Even share", "Largest share (layer)", "Smallest share (layer)"}, {}};
  std::vector<Grid> grids;
  for (const std::string& config : r.setup.configs) {
    double high = -1, low = 2;
    size_t high_layer = 0, low_layer = 0, layers = 0, experts = 0;
    for (const Run& run : r.runs) {
      if (run.experiment != config || !run.complete || run.expert_load.empty()) continue;
      layers = run.expert_load.size();
      experts = run.expert_load[0].size();
      for (size_t layer = 0; layer < layers; ++layer)
        for (double share : run.expert_load[layer]) {
          if (share > high) high = share, high_layer = layer;
          if (share < low) low = share, low_layer = layer;
        }
    }
    if (layers) grids.push_back(Grid{config, mean_load(r, config)});
    if (layers)
      table.rows.push_back({code(config), std::to_string(layers), std::to_string(experts),
                            fmt::format("{:.1f}%", 100.0 / static_cast<double>(experts)),
                            fmt::format("{:.1f}% ({})", 100 * high, high_layer), fmt::format("{:.1f}% ({})", 100 * low, low_layer)});
  }
  if (table.rows.empty()) return;
  out.push_back(Heading{3, "Expert load"});
  out.push_back(std::move(table));
  out.push_back(Paragraph{"The share of a layer's token-to-expert choices that went to one expert, extremes over layers and seeds."});
  add_figure(out, prefix + "experts.svg", "Share of each expert in each layer, mean over seeds: the darker, the larger.",
             grid_chart(grids, "layer", "expert"));
}

void add_curves(Document& out, const Results& r, const std::string& prefix) {
  struct Kind {
    const char* name;
    const char* file;
    std::vector<Point> Curves::*points;
  };
  struct Ruler {
    const char* name;
    Value Point::*x;
    int digits;
  };
  constexpr Kind kKinds[] = {{"validation loss", "val_loss.svg", &Curves::eval}, {"training loss", "train_loss.svg", &Curves::train}};
  const Ruler rulers[] = {{"micro-step", nullptr, 0}, {"tokens", &Point::tokens, 0}, {"seconds", &Point::seconds, 1}};
  Document figures;
  for (const Ruler& ruler : rulers)
    for (const Kind& kind : kKinds) {
      std::vector<Series> series;
      for (const std::string& config : r.setup.configs) series.push_back(curve(r, config, kind.points, ruler.x, 250));
      // Markdown shows the curves by step; the HTML page all of them.
      add_figure(figures, ruler.x ? "" : prefix + kind.file,
                 fmt::format("{}{} by {}: mean over seeds, the band from the lowest to the highest seed.",
                             static_cast<char>(std::toupper(kind.name[0])), kind.name + 1, ruler.name),
                 line_chart(series, ruler.name, kind.name, ruler.digits));
    }
  if (figures.empty()) return;
  out.push_back(Heading{3, "Loss curves"});
  out.insert(out.end(), figures.begin(), figures.end());
}

}  // namespace weft
