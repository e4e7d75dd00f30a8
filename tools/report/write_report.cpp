// The files of a report: its document as Markdown and HTML, the figures, and the numbers for programs.
#include <unistd.h>

#include <cctype>
#include <fstream>
#include <nlohmann/json.hpp>

#include "engine/check.h"
#include "tools/report/chart.h"
#include "tools/report/comparison.h"
#include "tools/report/report.h"
#include "tools/report/tensorboard.h"

namespace weft {
namespace {

using Json = nlohmann::ordered_json;

Json or_null(const std::optional<double>& value) { return value ? Json(*value) : Json(); }
Json or_null(const std::optional<int64_t>& value) { return value ? Json(*value) : Json(); }
Json or_null(const std::optional<Interval>& i) { return i ? Json{i->low, i->high} : Json(); }
Json or_null(const std::optional<Effect>& e) {
  return e ? Json{{"d", e->d}, {"hedges_g", or_null(e->g)}, {"d_interval_95", or_null(e->interval)}} : Json();
}

Json summary_json(const Summary& s) {
  return {{"n", s.n}, {"mean", s.n ? Json(s.mean) : Json()}, {"sd", or_null(s.sd)}, {"interval_95", or_null(s.interval)}};
}

Json folder_json(const Results& r, const ReportOptions& options) {
  const Measure* const measures[] = {&kValLoss,    &kValPerplexity, &kValAccuracy, &kTrainLoss,        &kTime,  &kPeakMemory,
                                     &kParameters, &kStepTime,      &kThroughput,  &kActiveParameters, &kFlops, &kKvCache};
  Json folder{{"folder", r.folder.string()}, {"status", r.status}, {"complete_runs", complete_runs(r)}, {"wanted_runs", wanted_runs(r)},
              {"windows_overlap", r.setup.windows_overlap}, {"configs", r.setup.configs}, {"seeds", r.setup.seeds}};
  for (const Measure* m : measures) {
    Json& measure = folder["measures"][m->key];
    for (const std::string& config : r.setup.configs) {
      measure["summaries"][config] = summary_json(summary_of(r, config, *m));
      Json& values = measure["values"][config] = Json::object();
      for (int64_t seed : r.setup.seeds)
        if (const Run* run = r.find(config, seed); run && run->complete) values[std::to_string(seed)] = or_null(run->*m->value);
    }
    measure["comparisons"] = Json::array();
    for (const Comparison& c : compare(r, *m, options.difference)) {
      const Paired& p = c.paired;
      measure["comparisons"].push_back(
          {{"base", c.base}, {"other", c.other}, {"seeds", c.seeds}, {"difference", summary_json(p.difference)}, {"t", or_null(p.t)},
           {"p", or_null(p.p)}, {"p_holm", or_null(c.p_holm)}, {"p_permutation", or_null(p.permutation)}, {"p_sign", or_null(p.sign)},
           {"cohens_d_paired", or_null(p.paired)}, {"cohens_d_pooled", or_null(p.pooled)}, {"detectable", or_null(c.detectable)},
           {"seeds_needed", or_null(c.seeds_needed)}, {"verdict", verdict_sentence(c, *m)}});
    }
  }
  return folder;
}

std::string make_json(std::span<const Results> folders, const ReportOptions& options) {
  Json report{{"schema", "weft-report-1"}, {"level", kLevel}, {"folders", Json::array()}};
  for (const Results& r : folders) report["folders"].push_back(folder_json(r, options));
  return report.dump(1) + "\n";
}

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string out = "\"";
  for (char c : text) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

std::string make_csv(std::span<const Results> folders) {
  std::string out = "folder,experiment_name,seed,kind,micro_step,tokens,seconds,loss,accuracy,grad_norm,lr,memory_gb\n";
  const auto cell = [](const Value& v) { return v ? fmt::format("{}", *v) : std::string(); };
  for (const Results& r : folders)
    for (const auto& [run, curves] : r.curves)
      for (const auto& [kind, points] : {std::pair{"train", &curves.train}, std::pair{"eval", &curves.eval}})
        for (const Point& p : *points)
          out += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{}\n", csv_cell(r.folder.string()), csv_cell(run.first), run.second, kind,
                             p.micro_step, cell(p.tokens), cell(p.seconds), cell(p.loss), cell(p.accuracy), cell(p.grad_norm),
                             cell(p.lr), cell(p.memory_gb));
  return out;
}

// A file name from foreign text.
std::string file_name(std::string text) {
  for (char& c : text)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-') c = '_';
  return text.substr(0, 100);
}

std::string make_events(const Curves& curves) {
  std::vector<ScalarEvent> events;
  for (const std::vector<Point>* points : {&curves.train, &curves.eval})
    for (const Point& p : *points) {
      ScalarEvent& event = events.emplace_back(ScalarEvent{p.seconds.value_or(0), p.micro_step, {}});
      const auto add = [&](const char* tag, const Value& value) {
        if (value) event.values.emplace_back(tag, static_cast<float>(*value));
      };
      add(points == &curves.train ? "loss/train" : "loss/validation", p.loss);
      add("accuracy/validation", p.accuracy);
      add("grad_norm", p.grad_norm);
      add("lr", p.lr);
      add("memory_gb", p.memory_gb);
    }
  return tensorboard_events(events);
}

struct Output {
  std::string name, content;
};

void write_all(const std::filesystem::path& out, const std::vector<Output>& files) {
  std::error_code error;
  std::filesystem::create_directories(out, error);
  if (error) fail(Fault::io, "{}: cannot be created: {}", out.string(), error.message());
  for (const Output& file : files)
    if (std::filesystem::is_directory(out / file.name, error))
      fail(Fault::io, "{}: cannot be written: it is a folder", (out / file.name).string());
  for (const Output& file : files)
    if (!std::filesystem::create_directories((out / file.name).parent_path(), error) && error)
      fail(Fault::io, "{}: cannot be written: {}", (out / file.name).string(), error.message());
  std::vector<std::filesystem::path> waiting;
  const auto clean = [&] {
    for (const auto& path : waiting) std::filesystem::remove(path, error);
  };
  for (const Output& file : files) {
    const std::filesystem::path target = out / file.name;
    const std::filesystem::path path = target.parent_path() / fmt::format(".{}.{}.part", target.filename().string(), ::getpid());
    waiting.push_back(path);
    std::ofstream stream(path, std::ios::binary | std::ios::trunc);
    stream << file.content;
    stream.close();
    if (!stream) {
      clean();
      fail(Fault::io, "{}: cannot be written", (out / file.name).string());
    }
  }
  for (size_t i = 0; i < files.size(); ++i) {
    std::filesystem::rename(waiting[i], out / files[i].name, error);
    if (!error) continue;
    const std::string reason = error.message();
    clean();
    fail(Fault::io, "{}: cannot be written: {}", (out / files[i].name).string(), reason);
  }
}

}  // namespace

std::string write_report(std::span<const Results> folders, const std::filesystem::path& out, const ReportOptions& options) {
  const Document document = make_report(folders, options);
  std::string markdown = to_markdown(document);
  std::vector<Output> files{{"report.html", to_html(document, "Attention configurations compared")},
                            {"report.json", make_json(folders, options)},
                            {"metrics.csv", make_csv(folders)}};
  for (const Block& block : document)
    if (const Figure* figure = std::get_if<Figure>(&block); figure && !figure->file.empty())
      files.push_back({figure->file, standalone_svg(figure->svg)});
  for (size_t i = 0; i < folders.size(); ++i)
    for (const auto& [run, curves] : folders[i].curves)
      files.push_back({fmt::format("tensorboard/{}{}-{}/events.out.tfevents.0.weft", folders.size() > 1 ? fmt::format("{}-", i + 1) : "",
                                   file_name(run.first), run.second), make_events(curves)});
  files.push_back({"report.md", markdown});
  write_all(out, files);
  return markdown;
}

}  // namespace weft
