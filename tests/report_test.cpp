// The report: its statistics against values computed independently (scipy 1.17, mpmath for the noncentral t; the
// numbers are in report_fixtures), what it says in the cases that matter, and the input that it refuses.
#include "tools/report/report.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "engine/check.h"
#include "tests/scratch.h"
#include "tools/report/comparison.h"
#include "tools/report/statistics.h"
#include "tools/report/tensorboard.h"

using namespace weft;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

const fs::path kFixtures = fs::path(WEFT_SOURCE_DIR) / "tests/report_fixtures";

std::string read(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

void write(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

json good_results() { return json::parse(read(kFixtures / "three_seeds/results.json")); }

// A fresh run folder that goes when the case ends.
struct Folder : Scratch {
  explicit Folder(const std::string& results, const std::string& metrics = "") {
    write(path / "results.json", results);
    if (!metrics.empty()) write(path / "metrics.jsonl", metrics);
  }
};

std::string report_of(const json& results) {
  const Folder folder(results.dump());
  const Results read[] = {read_results(folder.path)};
  return to_markdown(make_report(read));
}

bool says(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void near(const std::optional<double>& found, const json& expected, const std::string& what) {
  CAPTURE(what);
  REQUIRE(found.has_value() == !expected.is_null());
  if (!found) return;
  const double wanted = expected.get<double>();
  CAPTURE(*found);
  CAPTURE(wanted);
  CHECK(std::abs(*found - wanted) <= 1e-9 * std::max(1.0, std::abs(wanted)));
}

void near(const std::optional<Effect>& found, const json& expected, const std::string& what) {
  CAPTURE(what);
  REQUIRE(found.has_value() == !expected.is_null());
  if (!found) return;
  near(found->d, expected["d"], what + " d");
  near(found->g, expected["g"], what + " g");
  REQUIRE(found->interval);
  near(found->interval->low, expected["low"], what + " low");
  near(found->interval->high, expected["high"], what + " high");
}

Error error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e;
  }
  FAIL("expected an Error, found none");
  return Error(Fault::internal, "");
}

}  // namespace

TEST_CASE("paired statistics equal scipy's: ties, two seeds, no variance") {
  const json all = json::parse(read(kFixtures / "statistics.json"));
  REQUIRE(all["pairs"].size() == 9);
  for (const json& c : all["pairs"]) {
    const std::string name = c["name"];
    CAPTURE(name);
    const std::vector<double> a = c["a"], b = c["b"];
    const Paired p = compare_paired(a, b);
    CHECK(p.difference.n == c["difference"]["n"].get<int64_t>());
    near(p.difference.mean, c["difference"]["mean"], "mean");
    near(p.difference.sd, c["difference"]["sd"], "sd");
    near(p.difference.interval->low, c["difference"]["low"], "low");
    near(p.difference.interval->high, c["difference"]["high"], "high");
    near(p.t, c["t"], "t");
    near(p.p, c["p"], "p");
    near(p.permutation, c["permutation"], "permutation");
    near(p.sign, c["sign"], "sign");
    near(p.paired, c["paired"], "paired");
    near(p.pooled, c["pooled"], "pooled");
  }
}

TEST_CASE("power, detectable difference, seeds needed, Holm and Hedges equal independent values") {
  const json all = json::parse(read(kFixtures / "statistics.json"));
  for (const json& c : all["power"]) near(paired_power(c["effect"], c["n"], c["alpha"]), c["power"], "power " + c.dump());
  for (const json& c : all["detectable"])
    near(detectable_difference(c["sd"], c["n"], c["alpha"]), c["difference"], "detectable " + c.dump());
  for (const json& c : all["seeds"]) {
    CAPTURE(c.dump());
    CHECK(seeds_needed(c["difference"], c["sd"], c["alpha"]) == c["seeds"].get<int64_t>());
  }
  for (const json& c : all["hedges"]) near(hedges_correction(c["freedom"]), c["correction"], "hedges");
  for (const json& c : all["holm"]) {
    const std::vector<double> p = c["p"], adjusted = holm(p);
    REQUIRE(adjusted.size() == p.size());
    for (size_t i = 0; i < p.size(); ++i) near(adjusted[i], c["adjusted"][i], "holm");
  }
}

TEST_CASE("what a sample does not determine is absent, not nan") {
  CHECK(summarise({}).n == 0);
  const std::vector<double> one{5.5};
  CHECK_FALSE(summarise(one).sd);
  const Paired single = compare_paired(one, one);
  CHECK_FALSE((single.p || single.permutation || single.paired || single.pooled));
  CHECK_FALSE(detectable_difference(0, 5, 0.05));
  CHECK_FALSE(seeds_needed(0, 0.01, 0.05));
  CHECK_FALSE(seeds_needed(1e-9, 1, 0.05));
  CHECK_FALSE(seeds_needed(0.1, 0, 0.05));
  // Differences that agree up to rounding have no spread: 0.1 + 0.2 is not 0.3.
  const Paired rounded = compare_paired(std::vector{5.1, 5.2, 5.3}, std::vector{5.2, 5.3, 5.4});
  CHECK(*rounded.difference.sd == 0);
  CHECK_FALSE(rounded.t);
  // A spread so small that its ratio leaves the noncentral t's range still gives a finding, without an interval.
  const Paired extreme = compare_paired(std::vector{1.0, 2.0, 3.0}, std::vector{2.0, 3.0, 4.0 + 1e-7});
  REQUIRE(extreme.paired);
  CHECK_FALSE(extreme.paired->interval);
}

TEST_CASE("three seeds: table, verdicts, categories") {
  const Results r[] = {read_results(kFixtures / "three_seeds")};
  const std::string text = to_markdown(make_report(r));
  CHECK(says(text, "| Experiment | Val Loss | Val Perp | Val Acc | Time (min) | Peak Mem (GB) | Params (M) |"));
  CHECK(says(text, "| `baseline` | 5.4492 | 232.57 |"));
  CHECK(says(text, "`lora` and `baseline` are **not distinguishable at 3 seeds** in validation loss"));
  CHECK(says(text, "`enhanced` has a **higher validation loss** than `baseline`, by 0.0769"));
  CHECK(says(text, "| `lora` | 2.600 | 1.750 | 1.900 | 13.050 | 0.500 | 0.250 | 20.050 |"));
  CHECK(says(text, "40.0% (1)"));
  CHECK(says(text, "is torn and was left out"));
  CHECK(says(text, "| `lora` | 6.4031 | 5.4557 | +0.0051 | +0.0065 | 16.51–16.53 | 20.05 | 1.20 |"));
  CHECK_FALSE(says(text, "windows overlap"));
  CHECK_FALSE(says(text, "no difference"));
  CHECK_FALSE(says(text, "nan"));
  CHECK(r[0].curves.at({"lora", 43}).eval.size() == 5);
}

TEST_CASE("one seed concludes nothing; the seed protocol tells that its windows overlap") {
  json results = good_results();
  results["setup"]["seeds"] = {42};
  results["setup"]["protocol"] = "seed";
  json& runs = results["runs"];
  for (size_t i = runs.size(); i-- > 0;)
    if (runs[i]["seed"] != 42) runs.erase(i);
  const std::string text = report_of(results);
  CHECK(says(text, "With one seed nothing can be concluded about significance"));
  CHECK(says(text, "Training and validation windows overlap"));
  CHECK_FALSE(says(text, "distinguishable"));
  CHECK_FALSE(says(text, "Holm-adjusted"));
}

TEST_CASE("missing and interrupted runs are shown and enter no mean") {
  json results = good_results();
  for (json& run : results["runs"]) {
    if (run["experiment_name"] == "lora" && run["seed"] == 43) run["status"] = "interrupted";
    if (run["experiment_name"] == "baseline") run["peak_memory_by_category_gb"] = nullptr;
    if (run["experiment_name"] == "baseline" && run["seed"] == 42) run["val_loss"] = nullptr;
  }
  results["runs"].erase(8);  // enhanced, 44
  results["status"] = "interrupted";
  const std::string text = report_of(results);
  CHECK(says(text, "7 of 9 runs are complete"));
  CHECK(says(text, "`enhanced` with seed 44 is missing."));
  CHECK(says(text, "`lora` with seed 43 is `interrupted`"));
  CHECK(says(text, "`baseline` with seed 42 has no validation loss."));
  CHECK(says(text, "| `enhanced` | 44 | missing | missing |"));
  CHECK(says(text, "2 each"));
  CHECK(says(text, "| `lora` | Val Loss | 2 |"));
  CHECK(says(text, "| `baseline` | missing | missing |"));

  results["runs"] = json::array();
  CHECK(says(report_of(results), "No run is complete"));
  results["setup"]["configs"] = json::array();
  results["setup"]["seeds"] = json::array();
  CHECK(says(report_of(results), "no two configurations"));
}

TEST_CASE("optional keys may be absent, and foreign names are shown as text") {
  json results = good_results();
  results["setup"] = {{"protocol", "strict"}, {"configs", {"a|b`<script>"}}, {"seeds", {1}}, {"preset", nullptr}};
  results["runs"] = json::array({{{"experiment_name", "a|b`<script>"}, {"seed", 1}, {"status", "complete"}}});
  const std::string text = report_of(results);
  CHECK(says(text, "`a\\|b'<script>`"));
  CHECK(says(text, "Not recorded."));
}

TEST_CASE("the figures of a tiny model do not vanish") {
  json results = good_results();
  for (json& run : results["runs"]) run["peak_memory_gb"] = 0.00123456;
  const std::string text = report_of(results);
  CHECK(says(text, "| `lora` | Peak Mem (GB) | 3 | 0.00123 | 0.000 |"));
}

TEST_CASE("several folders stand side by side, matched by configuration") {
  json other = good_results();
  other["setup"]["optimizer"] = "adamw";
  other["setup"]["configs"] = {"enhanced", "baseline"};
  for (size_t i = other["runs"].size(); i-- > 0;)
    if (other["runs"][i]["experiment_name"] == "lora") other["runs"].erase(i);
  const Folder folder(other.dump());
  const Results r[] = {read_results(kFixtures / "three_seeds"), read_results(folder.path)};
  const std::string text = to_markdown(make_report(r));
  CHECK(says(text, "## Side by side"));
  CHECK(says(text, "| Optimizer | `muon` | `adamw` |"));
  CHECK_FALSE(says(text, "| Precision | `bf16` | `bf16` |\n| Optimizer"));
  CHECK(says(text, "| `lora` | Val Loss | 5.4557 ± 0.0051 (3 seeds) | missing |"));
  CHECK(says(text, "| `enhanced` | Val Loss | 5.5261 ± 0.0131 (3 seeds) | 5.5261 ± 0.0131 (3 seeds) |"));
}

TEST_CASE("bad input is refused with file and field") {
  struct Case {
    const char* what;
    std::function<void(json&)> spoil;
    const char* expected;
  };
  const Case cases[] = {
      {"foreign schema", [](json& j) { j["schema"] = "other-2"; }, "results.json: schema: expected weft-results-1, found other-2"},
      {"no schema", [](json& j) { j.erase("schema"); }, "schema: expected weft-results-1, found none"},
      {"schema a number", [](json& j) { j["schema"] = 1; }, "schema: expected text, found 1"},
      {"no set-up", [](json& j) { j.erase("setup"); }, "setup: expected a value, found none"},
      {"set-up an array", [](json& j) { j["setup"] = json::array(); }, "setup: expected an object, found an array"},
      {"unknown protocol", [](json& j) { j["setup"]["protocol"] = "lax"; }, "setup.protocol: expected \"seed\" or \"strict\""},
      {"seed as text", [](json& j) { j["setup"]["seeds"] = {"42"}; }, "setup.seeds: expected an integer, found the text \"42\""},
      {"huge seed", [](json& j) { j["setup"]["seeds"] = {UINT64_MAX}; }, "setup.seeds: expected an integer"},
      {"overlap as text", [](json& j) { j["setup"]["windows_overlap"] = "no"; }, "setup.windows_overlap: expected true or false"},
      {"negative batch", [](json& j) { j["setup"]["batch"] = -16; }, "setup.batch: expected a count, found -16"},
      {"runs an object", [](json& j) { j["runs"] = json::object(); }, "runs: expected an array, found an object"},
      {"loss as text", [](json& j) { j["runs"][1]["val_loss"] = "5.4"; }, "runs[1].val_loss: expected a number, found the text \"5.4\""},
      {"negative time", [](json& j) { j["runs"][0]["training_time_minutes"] = -1; }, "runs[0].training_time_minutes: expected a number that is not negative"},
      {"no name", [](json& j) { j["runs"][2].erase("experiment_name"); }, "runs[2].experiment_name: expected a value"},
      {"a run twice", [](json& j) { j["runs"].push_back(j["runs"][0]); }, "runs[9]: expected each configuration and seed once"},
      {"category as text", [](json& j) { j["runs"][0]["peak_memory_by_category_gb"]["data"] = true; }, "runs[0].peak_memory_by_category_gb.data: expected a number, found true"},
      {"absurd loss", [](json& j) { j["runs"][0]["val_loss"] = 1e300; }, "runs[0].val_loss: expected a number of at most 1e30"},
      {"ragged experts", [](json& j) { j["runs"][0]["expert_load"] = {{0.5, 0.5}, {1.0}}; }, "runs[0].expert_load: expected as many experts"},
  };
  for (const Case& c : cases) {
    CAPTURE(c.what);
    json results = good_results();
    c.spoil(results);
    const Folder folder(results.dump());
    const Error e = error_of([&] { read_results(folder.path); });
    const std::string message = e.what();
    CAPTURE(message);
    CHECK(e.fault() == Fault::data);
    CHECK(says(message, "results.json: "));
    CHECK(says(message, c.expected));
  }

  const std::string good = good_results().dump();
  for (size_t size : {size_t{0}, size_t{1}, good.size() / 2, good.size() - 1}) {
    const Folder torn(good.substr(0, size));
    const Error e = error_of([&] { read_results(torn.path); });
    CHECK(e.fault() == Fault::data);
    CHECK(says(e.what(), "results.json: torn or not JSON at byte"));
  }
  const Folder huge("{\"schema\": 1e999}");
  CHECK(error_of([&] { read_results(huge.path); }).fault() == Fault::data);
  const Folder deep(std::string(200000, '['));
  CHECK(error_of([&] { read_results(deep.path); }).fault() == Fault::data);

  const Folder folder(good);
  fs::create_directories(folder.path / "metrics.jsonl");
  CHECK(error_of([&] { read_results(folder.path); }).fault() == Fault::io);

  const Error missing = error_of([] { read_results("/nonexistent/run"); });
  CHECK(missing.fault() == Fault::io);
  CHECK(says(missing.what(), "/nonexistent/run: no such folder"));
  const Error empty = error_of([] { read_results(kFixtures); });
  CHECK(empty.fault() == Fault::io);
  CHECK(says(empty.what(), "results.json: no such file"));
}

TEST_CASE("metrics.jsonl: a torn end is passed over, a broken middle is not, the later line stands") {
  const std::string good = good_results().dump();
  const auto line = [](int step, const char* loss) {
    return fmt::format("{{\"kind\":\"train\",\"experiment_name\":\"lora\",\"seed\":42,\"micro_step\":{},\"loss\":{}}}\n", step, loss);
  };
  {
    const Folder folder(good, line(2, "4.5") + line(1, "5.5") + line(2, "4.0") + line(3, "null") + "\n{\"kind\":\"ev");
    const Results r = read_results(folder.path);
    const auto& train = r.curves.at({"lora", 42}).train;
    REQUIRE(train.size() == 2);
    CHECK(*train[0].loss == 5.5);
    CHECK(*train[1].loss == 4.0);
    REQUIRE(r.remarks.size() == 1);
    CHECK(says(r.remarks[0], "line 6"));
  }
  {
    const Folder folder(good, line(1, "5.5") + "{\"kind\":\n" + line(2, "4.5"));
    CHECK(says(error_of([&] { read_results(folder.path); }).what(), "metrics.jsonl:2: expected a JSON object"));
  }
  {
    const Folder folder(good, line(1, "\"x\"") + line(2, "4"));
    CHECK(says(error_of([&] { read_results(folder.path); }).what(), "metrics.jsonl:1: loss: expected a number"));
  }
}

TEST_CASE("HTML stands alone: nothing fetched, names escaped, hover values readable") {
  json results = good_results();
  for (json& run : results["runs"])
    if (run["experiment_name"] == "lora") run["experiment_name"] = "<b>&\"lora";
  results["setup"]["configs"][1] = "<b>&\"lora";
  std::string metrics = read(kFixtures / "three_seeds/metrics.jsonl");
  const std::string renamed = "\"<b>&\\\"lora\"";
  for (size_t at = 0; (at = metrics.find("\"lora\"", at)) != std::string::npos; at += renamed.size())
    metrics.replace(at, 6, renamed);
  const Folder folder(results.dump(), metrics);
  const Results r[] = {read_results(folder.path)};
  const std::string html = to_html(make_report(r), "Title & more");
  CHECK(says(html, "<title>Title &amp; more</title>"));
  CHECK(says(html, "<code>&lt;b&gt;&amp;&quot;lora</code>"));
  CHECK_FALSE(says(html, "<b>"));
  CHECK(says(html, "<strong>higher validation loss</strong>"));
  for (const char* outside : {"src=", "href=", "@import", "url(", "fetch"}) CHECK_FALSE(says(html, outside));
  CHECK(says(html, R"(lines.join('\n'))"));

  size_t charts = 0;
  for (size_t at = 0; (at = html.find("data-hover=\"", at)) != std::string::npos; ++charts) {
    at += 12;
    std::string text = html.substr(at, html.find('"', at) - at);
    const std::pair<const char*, const char*> marks[] = {{"&lt;", "<"}, {"&gt;", ">"}, {"&quot;", "\""}, {"&amp;", "&"}};
    for (const auto& [mark, meant] : marks)
      for (size_t k = 0; (k = text.find(mark, k)) != std::string::npos; ++k) text.replace(k, std::strlen(mark), meant);
    const json values = json::parse(text);
    CHECK(values.size() >= 4);
    CHECK(values[0][1].size() >= 2);
  }
  CHECK(charts == 6);
}

TEST_CASE("report.json and the pictures carry the same numbers") {
  const Results one = read_results(kFixtures / "three_seeds");
  const Results r[] = {one, one};
  const Folder folder("{}");
  write_report(r, folder.path);
  const json report = json::parse(read(folder.path / "report.json"));
  CHECK(report["schema"] == "weft-report-1");
  const json& loss = report["folders"][1]["measures"]["val_loss"];
  CHECK(loss["values"]["lora"]["43"] == 5.4614);
  near(loss["summaries"]["baseline"]["mean"].get<double>(), 16.3475 / 3, "mean");
  near(loss["comparisons"][0]["p"].get<double>(), 0.3486610527210926, "p");
  CHECK(says(loss["comparisons"][0]["verdict"], "not distinguishable at 3 seeds"));
  const std::string picture = read(folder.path / "report_2_differences.svg");
  CHECK(says(picture, "lora: +0.0065 (95% CI -0.0166 to +0.0297)"));
  CHECK(says(picture, "<style>"));
  CHECK(fs::exists(folder.path / "report_1_val_loss.svg"));
  CHECK(says(read(folder.path / "metrics.csv"), ",lora,43,eval,100,"));
  CHECK(fs::exists(folder.path / "tensorboard/2-lora-43/events.out.tfevents.0.weft"));
}

TEST_CASE("parameters by part are shown in millions, and only where a run records them") {
  json results = good_results();
  CHECK_FALSE(says(report_of(results), "Parameters by part"));
  for (json& run : results["runs"])
    run["parameters_by_part"] = {{"embedding", 37748736}, {"attention", 23592960}, {"experts", 377487360}, {"router", 61440}, {"norms", 16128}};
  CHECK(says(report_of(results), "| `baseline` | 37.749 | 23.593 | 377.487 | 0.061 | 0.016 | 438.907 |"));
  results["runs"][0]["parameters_by_part"]["router"] = "few";
  const Folder folder(results.dump());
  CHECK(says(error_of([&] { read_results(folder.path); }).what(), "runs[0].parameters_by_part.router: expected a number"));
}

TEST_CASE("the memory timeline of a step is drawn with its peak, and checked") {
  const Folder folder(good_results().dump());
  const fs::path file = folder.path / "memory_timeline_lora_43.csv";
  std::string csv = "sequence,bytes,category,layer,allocated\n";
  for (int i = 0; i < 1000; ++i)
    csv += fmt::format("{},{},activation,\"a,b\",{}\n", i, i % 2 ? -1 : 1, i == 501 ? 7'000'000'000 : 2'000'000'000 + i);
  write(file, csv);
  const Results r[] = {read_results(folder.path)};
  const std::string text = write_report(r, folder.path);
  CHECK(says(text, "Memory during one optimizer step"));
  CHECK(says(text, "`lora` with seed 43 (1000 events)"));
  CHECK(says(read(folder.path / "report_memory_timeline.svg"), "lora: 7.0000 (2.0000 to 7.0000)"));
  write(file, csv + "1000,1,data,x,-5\n");
  CHECK(says(error_of([&] { read_results(folder.path); }).what(), "memory_timeline_lora_43.csv:1002: allocated"));
  write(file, "a,b\n");
  CHECK(error_of([&] { read_results(folder.path); }).fault() == Fault::data);
}

TEST_CASE("TensorBoard event files: checksums, frames, names") {
  // RFC 3720, B.4, and the check value of the CRC catalogue.
  CHECK(crc32c("") == 0);
  CHECK(crc32c("123456789") == 0xe3069283);
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aa);
  CHECK(crc32c(std::string(32, '\xff')) == 0x62a8ab43);

  const Folder folder(good_results().dump(),
                      R"({"kind":"train","experiment_name":"../lora","seed":42,"micro_step":300,"loss":5.5,"lr":0.25,"grad_norm":2,"seconds":1})"
                      "\n"
                      R"({"kind":"eval","experiment_name":"../lora","seed":42,"micro_step":300,"val_loss":5.25,"val_accuracy":0.125})"
                      "\n");
  const Results r[] = {read_results(folder.path)};
  CHECK(says((write_report(r, folder.path), read(folder.path / "metrics.csv")), ",../lora,42,train,300,,1,5.5,,2,0.25,\n"));
  const std::string bytes = read(folder.path / "tensorboard/___lora-42/events.out.tfevents.0.weft");
  const auto number = [&](size_t at, int size) {
    uint64_t x = 0;
    for (int i = size; i-- > 0;) x = x << 8 | static_cast<unsigned char>(bytes.at(at + static_cast<size_t>(i)));
    return x;
  };
  const auto masked = [](const std::string& data) {
    const uint32_t crc = crc32c(data);
    return static_cast<uint32_t>((crc >> 15 | crc << 17) + 0xa282ead8u);
  };
  std::vector<std::string> records;
  for (size_t at = 0; at < bytes.size();) {
    const size_t size = number(at, 8);
    CHECK(number(at + 8, 4) == masked(bytes.substr(at, 8)));
    records.push_back(bytes.substr(at + 12, size));
    CHECK(number(at + 12 + size, 4) == masked(records.back()));
    at += size + 16;
  }
  REQUIRE(records.size() == 3);
  CHECK(says(records[0], "\x1a\x0d" "brain.Event:2"));
  CHECK(says(records[1], "\x10\xac\x02"));                                         // step 300
  CHECK(says(records[1], std::string("\x0a\x0a" "loss/train\x15\x00\x00\xb0\x40", 17)));  // 5.5
  CHECK(says(records[1], std::string("\x0a\x02lr\x15\x00\x00\x80\x3e", 9)));               // 0.25
  CHECK(says(records[2], "loss/validation"));
  CHECK(says(records[2], "accuracy/validation"));
}

TEST_CASE("writing: everything or nothing") {
  const Results r[] = {read_results(kFixtures / "three_seeds")};
  const Folder folder("{}");
  const std::string text = write_report(r, folder.path / "new");
  CHECK(read(folder.path / "new/report.md") == text);
  for (const auto& entry : fs::directory_iterator(folder.path / "new"))
    CHECK_FALSE(says(entry.path().filename().string(), ".part"));

  write(folder.path / "file", "");
  CHECK(error_of([&] { write_report(r, folder.path / "file"); }).fault() == Fault::io);
  fs::create_directories(folder.path / "blocked/report.md/x");
  CHECK(error_of([&] { write_report(r, folder.path / "blocked"); }).fault() == Fault::io);
  CHECK(std::distance(fs::directory_iterator(folder.path / "blocked"), fs::directory_iterator()) == 1);
}
