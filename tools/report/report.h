// The report over one or several run folders: read, compare, write. Used by tools/report.cpp and by its test.
#pragma once
#include <filesystem>
#include <span>
#include <string>

#include "tools/report/document.h"
#include "tools/report/results.h"

namespace weft {

struct ReportOptions {
  double difference = 0.01;  // nats: "how many seeds would it take to find this much?"
};

Document make_report(std::span<const Results> folders, const ReportOptions& options = {});

// Renders report.md, its pictures, report.html, report.json, metrics.csv and tensorboard/<config>-<seed>/ (TensorBoard's event
// files; its wall time is the seconds since the run's start), then puts each in place by a rename; report.md is the last.
// Returns its text.
std::string write_report(std::span<const Results> folders, const std::filesystem::path& out,
                         const ReportOptions& options = {});

}  // namespace weft
