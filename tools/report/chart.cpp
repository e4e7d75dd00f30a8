#include "tools/report/chart.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "tools/report/document.h"

namespace weft {
namespace {

constexpr double kWidth = 720, kLeft = 70, kRight = 20;
constexpr int kColours = 6;
constexpr const char* kDashes[] = {"", "7 4", "2 3", "9 3 2 3", "12 4", "4 2"};

std::string open_svg(double height, const std::string& label) {
  return fmt::format("<svg class=\"chart\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {:.0f}\" role=\"img\" "
                     "aria-label=\"{}\">\n", kWidth, height, escape_html(label));
}

std::string label(double x, double y, const char* anchor, const std::string& text) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor, escape_html(text));
}

// About five round values within [low, high].
struct Ticks {
  std::vector<double> at;
  int digits;
};
Ticks ticks(double low, double high) {
  const double raw = (high - low) / 5, power = std::pow(10.0, std::floor(std::log10(raw)));
  const double step = power * (raw / power < 1.5 ? 1 : raw / power < 3.5 ? 2 : raw / power < 7.5 ? 5 : 10);
  Ticks t{{}, std::max(0, -static_cast<int>(std::floor(std::log10(step) + 1e-9)))};
  for (double v = std::ceil(low / step - 1e-9) * step; v <= high + step * 1e-9 && t.at.size() < 20; v += step)
    t.at.push_back(std::abs(v) < step * 1e-9 ? 0 : v);
  return t;
}

std::string tick_text(double v, int digits) {
  if (std::abs(v) >= 1e9) return fmt::format("{:g}G", v / 1e9);
  if (std::abs(v) >= 1e6) return fmt::format("{:g}M", v / 1e6);
  if (std::abs(v) >= 1e4) return fmt::format("{:g}k", v / 1e3);
  return fmt::format("{:.{}f}", v, digits);
}

// A linear axis from [low, high] to pixels; a range without extent is widened.
struct Axis {
  double low, high, from, to;
  Axis(double lowest, double highest, double from, double to) : low(lowest), high(highest), from(from), to(to) {
    if (high - low > 1e-12 * std::max(1.0, std::abs(high))) return;
    const double room = std::max(1e-6, std::abs(high) * 0.01);
    low -= room;
    high += room;
  }
  double operator()(double v) const { return from + (v - low) / (high - low) * (to - from); }
};

std::string x_axis(const Axis& x, double top, double bottom, const std::string& title) {
  std::string svg;
  const Ticks t = ticks(x.low, x.high);
  for (double v : t.at) {
    svg += fmt::format("<line class=\"grid\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"{1:.1f}\" y2=\"{2:.1f}\"/>\n", x(v), top, bottom);
    svg += label(x(v), bottom + 16, "middle", tick_text(v, t.digits));
  }
  return svg + label((x.from + x.to) / 2, bottom + 36, "middle", title);
}

std::string legend(const std::vector<std::string>& names, double y, bool lines) {
  std::string svg;
  double x = kLeft;
  for (size_t i = 0; i < names.size(); ++i) {
    const int colour = static_cast<int>(i) % kColours;
    svg += lines ? fmt::format("<line class=\"line c{}\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke-dasharray=\"{}\"/>\n",
                               colour, x, x + 28, y - 4, y - 4, kDashes[colour])
                 : fmt::format("<rect class=\"fill c{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"14\" height=\"12\"/>\n", colour, x, y - 10);
    const double text = x + (lines ? 34 : 20);
    svg += label(text, y, "start", names[i]);
    x = text + 7.5 * static_cast<double>(names[i].size()) + 18;
  }
  return svg;
}

}  // namespace

std::string line_chart(const std::vector<Series>& series, const std::string& x_label, const std::string& y_label, int x_digits) {
  double x_low = 1e300, x_high = -1e300, y_low = 1e300, y_high = -1e300;
  for (const Series& s : series)
    for (const ChartPoint& p : s.points) {
      x_low = std::min(x_low, p.x), x_high = std::max(x_high, p.x);
      y_low = std::min(y_low, p.low), y_high = std::max(y_high, p.high);
    }
  if (x_low > x_high) return "";
  constexpr double kTop = 40, kBottom = 320;
  const double room = (y_high - y_low) * 0.04;
  const Axis x(x_low, x_high, kLeft, kWidth - kRight), y(y_low - room, y_high + room, kBottom, kTop);

  std::string svg = open_svg(370, y_label + " by " + x_label);
  const Ticks t = ticks(y.low, y.high);
  for (double v : t.at) {
    svg += fmt::format("<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>\n", x.from, x.to, y(v), y(v));
    svg += label(kLeft - 8, y(v) + 4, "end", tick_text(v, t.digits));
  }
  svg += x_axis(x, kTop, kBottom, x_label);
  svg += fmt::format("<text transform=\"translate(16 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n", (kTop + kBottom) / 2,
                     escape_html(y_label));
  std::vector<std::string> names;
  for (const Series& s : series) names.push_back(s.name);
  svg += legend(names, 22, true);

  std::map<double, std::vector<std::string>> hover;  // by x in pixels
  for (size_t i = 0; i < series.size(); ++i) {
    const int colour = static_cast<int>(i) % kColours;
    std::string line, band, back, dots;
    for (const ChartPoint& p : series[i].points) {
      line += fmt::format("{:.1f},{:.1f} ", x(p.x), y(p.y));
      band += fmt::format("{:.1f},{:.1f} ", x(p.x), y(p.high));
      back = fmt::format("{:.1f},{:.1f} ", x(p.x), y(p.low)) + back;
      std::string text = fmt::format("{}: {:.4f}", series[i].name, p.y);
      if (p.high > p.low) text += fmt::format(" ({:.4f} to {:.4f})", p.low, p.high);
      std::vector<std::string>& lines = hover[std::round(x(p.x) * 10) / 10];
      if (lines.empty()) lines.push_back(fmt::format("{} {:.{}f}", x_label, p.x, x_digits));
      lines.push_back(text);
      if (series[i].points.size() <= 40)
        dots += fmt::format("<circle class=\"fill c{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\"><title>{}</title></circle>\n", colour,
                            x(p.x), y(p.y), escape_html(text));
    }
    svg += fmt::format("<polygon class=\"band c{}\" points=\"{}{}\"/>\n", colour, band, back);
    svg += fmt::format("<polyline class=\"line c{}\" points=\"{}\" stroke-dasharray=\"{}\"/>\n{}", colour, line, kDashes[colour], dots);
  }
  nlohmann::json values = nlohmann::json::array();
  for (const auto& [at, lines] : hover) values.push_back({at, lines});
  svg += fmt::format("<g class=\"hover\" data-top=\"{}\" data-bottom=\"{}\" data-hover=\"{}\"></g>\n</svg>\n", kTop, kBottom,
                     escape_html(values.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)));
  return svg;
}

std::string whisker_chart(const std::vector<Whisker>& whiskers, const std::string& x_label) {
  if (whiskers.empty()) return "";
  double low = 0, high = 0;
  for (const Whisker& w : whiskers) {
    low = std::min({low, w.value, w.interval ? w.interval->low : w.value});
    high = std::max({high, w.value, w.interval ? w.interval->high : w.value});
  }
  const double room = (high - low) * 0.05, bottom = 20 + 44 * static_cast<double>(whiskers.size());
  const Axis x(low - room, high + room, kLeft + 110, kWidth - kRight);
  std::string svg = open_svg(bottom + 50, x_label) + x_axis(x, 10, bottom, x_label);
  svg += fmt::format("<line class=\"zero\" x1=\"{0:.1f}\" x2=\"{0:.1f}\" y1=\"10\" y2=\"{1:.1f}\"/>\n", x(0), bottom);
  for (size_t i = 0; i < whiskers.size(); ++i) {
    const Whisker& w = whiskers[i];
    const double y = 36 + 44 * static_cast<double>(i);
    const int colour = static_cast<int>(w.colour) % kColours;
    std::string text = fmt::format("{}: {:+.4f}", w.name, w.value);
    if (w.interval) {
      text += fmt::format(" (95% CI {:+.4f} to {:+.4f})", w.interval->low, w.interval->high);
      const double a = x(w.interval->low), b = x(w.interval->high);
      svg += fmt::format("<path class=\"line c{}\" d=\"M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}v16M{:.1f} {:.1f}v16\"/>\n", colour, a, y, b, a,
                         y - 8, b, y - 8);
    }
    svg += fmt::format("<circle class=\"fill c{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"5\"><title>{}</title></circle>\n", colour, x(w.value), y,
                       escape_html(text));
    svg += label(kLeft + 100, y + 4, "end", w.name);
  }
  return svg + "</svg>\n";
}

std::string stack_chart(const std::vector<Stack>& stacks, const std::vector<std::string>& parts, const std::string& x_label) {
  double high = 0;
  for (const Stack& s : stacks) {
    double sum = 0;
    for (double part : s.parts) sum += part;
    high = std::max(high, sum);
  }
  if (high <= 0) return "";
  const double bottom = 40 + 42 * static_cast<double>(stacks.size());
  const Axis x(0, high, kLeft + 40, kWidth - kRight - 40);
  std::string svg = open_svg(bottom + 50, x_label) + legend(parts, 22, false) + x_axis(x, 36, bottom, x_label);
  for (size_t i = 0; i < stacks.size(); ++i) {
    const double y = 46 + 42 * static_cast<double>(i);
    svg += label(kLeft + 32, y + 18, "end", stacks[i].name);
    double sum = 0;
    for (size_t k = 0; k < stacks[i].parts.size(); ++k) {
      const double part = stacks[i].parts[k], from = x(sum), width = x(sum + part) - from;
      sum += part;
      if (part <= 0) continue;
      svg += fmt::format("<rect class=\"fill part c{}\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"28\"><title>{}</title></rect>\n",
                         k % kColours, from, y, width, escape_html(fmt::format("{}, {}: {:.3g} GB", stacks[i].name, parts[k], part)));
    }
    svg += label(x(sum) + 6, y + 18, "start", fmt::format("{:.4g}", sum));
  }
  return svg + "</svg>\n";
}

std::string grid_chart(const std::vector<Grid>& grids, const std::string& row_label, const std::string& column_label) {
  double high = 0;
  size_t most_rows = 0;
  for (const Grid& g : grids) {
    most_rows = std::max(most_rows, g.rows.size());
    for (const auto& row : g.rows)
      for (double v : row) high = std::max(high, v);
  }
  if (high <= 0 || most_rows == 0) return "";
  const double gap = 50, width = (kWidth - kLeft - kRight - gap * static_cast<double>(grids.size() - 1)) / static_cast<double>(grids.size());
  const double cell = 22, bottom = 30 + cell * static_cast<double>(most_rows);
  std::string svg = open_svg(bottom + 30, "share of choices by " + row_label + " and " + column_label);
  for (size_t i = 0; i < grids.size(); ++i) {
    const double left = kLeft + static_cast<double>(i) * (width + gap);
    svg += label(left + width / 2, 18, "middle", grids[i].name);
    svg += label(left + width / 2, bottom + 18, "middle", column_label);
    for (size_t r = 0; r < grids[i].rows.size(); ++r) {
      const auto& row = grids[i].rows[r];
      const double y = 28 + cell * static_cast<double>(r), step = width / static_cast<double>(row.size());
      svg += label(left - 6, y + 15, "end", i == 0 ? fmt::format("{} {}", row_label, r) : std::to_string(r));
      for (size_t c = 0; c < row.size(); ++c)
        svg += fmt::format("<rect class=\"heat\" x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" fill-opacity=\"{:.3f}\"><title>{}</title></rect>\n",
                           left + static_cast<double>(c) * step, y, step, cell, std::max(0.0, row[c]) / high,
                           escape_html(fmt::format("{}, {} {}, {} {}: {:.1f}%", grids[i].name, row_label, r, column_label, c, 100 * row[c])));
    }
  }
  return svg + "</svg>\n";
}

std::string chart_style() {
  // Okabe and Ito's palette, which the colour-blind can tell apart; lighter where the ground is dark.
  return R"(.chart text{font:12px system-ui,sans-serif;fill:#333}
.chart .grid{stroke:#ddd}.chart .zero{stroke:#333;stroke-dasharray:3 3}
.chart .line{fill:none;stroke:currentColor;stroke-width:2}.chart .fill{fill:currentColor}
.chart .part{stroke:#fff;stroke-width:1}
.chart .band{fill:currentColor;opacity:.18}.chart .heat{fill:#0072b2;stroke:#bbb;stroke-width:.5}
.c0{color:#0072b2}.c1{color:#d55e00}.c2{color:#009e73}.c3{color:#cc79a7}.c4{color:#e69f00}.c5{color:#56b4e9}
@media screen and (prefers-color-scheme:dark){.chart text{fill:#ddd}.chart .grid{stroke:#3a3a3a}.chart .zero{stroke:#ddd}
.chart .part{stroke:#16181c}.chart .heat{fill:#56b4e9;stroke:#444}.c0{color:#4aa8e0}.c1{color:#ff8a3d}.c2{color:#2fc79b}}
)";
}

std::string standalone_svg(const std::string& chart) {
  const size_t end = chart.find('>');
  return chart.substr(0, end + 1) + "\n<style>" + chart_style() + "</style>" + chart.substr(end + 1);
}

}  // namespace weft
