// report: compares the configurations of one or several run folders, writes report.md, report.html, report.json, the
// pictures, metrics.csv and TensorBoard's event files, and prints report.md.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "engine/check.h"
#include "tools/report/report.h"

namespace {

int run(int argc, char** argv) {
  CLI::App app("Compares the attention configurations that train_exp1 trained.");
  std::vector<std::string> folders;
  std::string out;
  weft::ReportOptions options;
  app.add_option("RUN_DIR", folders, "run folders of train_exp1; several are set side by side")->required();
  app.add_option("--out", out, "where to write the report (default: the first run folder)");
  app.add_option("--difference", options.difference, "say how many seeds it takes to find this difference in loss (nats)")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(weft::Fault::usage);
  }
  std::vector<weft::Results> results;
  for (const std::string& folder : folders) results.push_back(weft::read_results(folder));
  const std::string markdown = weft::write_report(results, out.empty() ? folders.front() : out, options);
  std::fwrite(markdown.data(), 1, markdown.size(), stdout);
  if (std::fflush(stdout) != 0) weft::fail(weft::Fault::io, "standard output: cannot be written");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return weft::run_program("report", [&] { return run(argc, argv); });
}
