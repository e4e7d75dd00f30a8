// The report's sections that are drawn: of each run's parameters, memory, routing and losses, as tables and pictures. Each
// adds nothing where the runs recorded nothing to draw, but memory, which says so. Used by report.cpp.
#pragma once
#include <string>

#include "tools/report/document.h"
#include "tools/report/results.h"

namespace weft {

// A picture, unless it is empty; a file named "" is drawn in the HTML page alone.
void add_figure(Document& out, const std::string& file, const std::string& caption, const std::string& svg);

// `prefix`: of the pictures' file names.
void add_curves(Document& out, const Results& r, const std::string& prefix);
void add_parameters(Document& out, const Results& r);
void add_memory(Document& out, const Results& r, const std::string& prefix);
void add_timeline(Document& out, const Results& r, const std::string& prefix);
void add_expert_load(Document& out, const Results& r, const std::string& prefix);

}  // namespace weft
