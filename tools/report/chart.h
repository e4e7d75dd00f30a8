// The report's pictures as SVG, without style: the colours c0.. and the text classes are given by chart_style(), once in
// the HTML page and once in every SVG file. Each form is told apart by more than colour: dashes, labels, order.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "tools/report/statistics.h"

namespace weft {

struct ChartPoint {
  double x, y, low, high;  // low and high bound the band
};
struct Series {
  std::string name;
  std::vector<ChartPoint> points;  // by x
};
// Lines with bands. Each x with values bears a text for hovering, in the attribute data-hover.
std::string line_chart(const std::vector<Series>&, const std::string& x_label, const std::string& y_label, int x_digits);

struct Whisker {
  std::string name;
  double value;
  std::optional<Interval> interval;
  size_t colour;
};
std::string whisker_chart(const std::vector<Whisker>&, const std::string& x_label);

struct Stack {
  std::string name;
  std::vector<double> parts;
};
std::string stack_chart(const std::vector<Stack>&, const std::vector<std::string>& parts, const std::string& x_label);

struct Grid {
  std::string name;
  std::vector<std::vector<double>> rows;  // shares, rows of one length
};
std::string grid_chart(const std::vector<Grid>&, const std::string& row_label, const std::string& column_label);

std::string chart_style();                             // CSS
std::string standalone_svg(const std::string& chart);  // the same picture as a file

}  // namespace weft
