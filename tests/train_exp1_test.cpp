// train_exp1 as its users meet it: what a run folder holds, and what bad input is answered with.
#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "data/token_file.h"
#include "tests/scratch.h"

namespace {
namespace fs = std::filesystem;
using Json = nlohmann::json;

// The text is stdout and stderr.
Answer run(const std::string& arguments) {
  return run_command("exec 2>&1; " WEFT_BINARY_DIR "/train_exp1 " + arguments);
}

Json read_json(const fs::path& path) {
  std::ifstream in(path);
  REQUIRE_MESSAGE(in.good(), path.string());
  return Json::parse(in);
}

const std::string kTiny = "--preset tiny --device cpu ";

}  // namespace

TEST_CASE("a run folder holds the settings, the points and the results") {
  const Scratch scratch;
  const std::string out = scratch / "run";
  const Answer answer = run(kTiny + "--configs baseline,enhanced --seeds 1,2 --out " + out);
  REQUIRE_MESSAGE(answer.code == 0, answer.text);
  const Json results = read_json(out + "/results.json");
  CHECK(results["schema"] == "weft-results-1");
  CHECK(results["status"] == "complete");
  REQUIRE(results["runs"].size() == 4);
  for (const Json& r : results["runs"]) {
    for (const char* key :
         {"experiment_name", "seed", "uses_deepseek", "status", "val_loss", "val_accuracy", "val_perplexity",
          "training_time_minutes", "initial_memory_gb", "peak_memory_gb", "final_memory_gb", "memory_used_gb",
          "parameter_count", "parameters_millions", "tokens_per_second", "step_ms_median", "peak_memory_by_category_gb"})
      CHECK_MESSAGE(r.contains(key), key);
    CHECK(r["uses_deepseek"] == (r["experiment_name"] == "enhanced"));
    CHECK(r["val_loss"].get<double>() < 5);
    double sum = 0;
    for (const auto& [category, gigabytes] : r["peak_memory_by_category_gb"].items()) sum += gigabytes.get<double>();
    CHECK(sum == doctest::Approx(r["peak_memory_gb"].get<double>()));
    int64_t parameters = 0;
    for (const auto& [part, n] : r["parameters_by_part"].items()) {
      CHECK_MESSAGE(n.get<int64_t>() > 0, part);
      parameters += n.get<int64_t>();
    }
    CHECK(parameters == r["parameter_count"].get<int64_t>());
    for (const Json& layer : r["expert_load"]) {
      double share = 0;
      for (const Json& x : layer) share += x.get<double>();
      CHECK(share == doctest::Approx(1));
    }
  }
  CHECK(results["runs"][0]["val_loss"] != results["runs"][1]["val_loss"]);  // each configuration is really its own
  CHECK(read_json(out + "/resolved_config.json")["models"]["enhanced"]["rope_scaling"] == "linear");
  CHECK(read_json(out + "/env.json").contains("weft_version"));
  int train = 0, eval = 0;
  std::ifstream metrics(out + "/metrics.jsonl");
  for (std::string line; std::getline(metrics, line);) ++(Json::parse(line)["kind"] == "train" ? train : eval);
  CHECK(train == 4 * 8);
  CHECK(eval == 4 * 2);

  const Answer again = run(kTiny + "--out " + out);
  CHECK(again.code == 2);
  CHECK_MESSAGE(again.text.find("already holds a run") != std::string::npos, again.text);
}

TEST_CASE("the same seed gives the same numbers") {
  const Scratch scratch;
  std::vector<Json> runs;
  for (const char* name : {"a", "b"}) {
    REQUIRE(run(kTiny + "--configs lora --out " + (scratch / name)).code == 0);
    runs.push_back(read_json(scratch / (std::string(name) + "/results.json"))["runs"][0]);
  }
  CHECK(runs[0]["val_loss"] == runs[1]["val_loss"]);
  CHECK(runs[0]["train_loss"] == runs[1]["train_loss"]);
}

TEST_CASE("bad input is answered with what is wrong and the documented exit code, and leaves nothing behind") {
  const Scratch scratch;
  const std::string out = scratch / "out";
  {
    std::ofstream(scratch / "gzip.bin") << "\x1f\x8b\x08 and so on";
    std::ofstream(scratch / "a_file") << "x";
    weft::write_token_file(scratch / "short.bin", std::vector<int32_t>(10, 1), weft::TokenWidth::u16);
    weft::write_token_file(scratch / "beyond.bin", std::vector<int32_t>(5000, 128), weft::TokenWidth::u16);
  }
  struct Case {
    std::string arguments;
    int code;
    std::string says;
  };
  const std::vector<Case> cases = {
      {"--stepz 3", 2, "--stepz"},
      {"--preset huge", 2, "exp1, quick, tiny"},
      {"--device gpu", 2, "auto, cpu or cuda"},
      {"--set steps", 2, "key=value"},
      {"--configs baseline,loraa", 3, "there are baseline, "},
      {"--configs ''", 3, "unknown configuration ''"},
      {"--data ''", 3, "data must be names"},
      {"--steps ''", 3, "steps"},
      {"--preset ''", 2, "--preset: expected a name"},
      {"--set preset=tiny", 3, "--preset chooses it"},
      {"--set zzzzzz=1", 3, "--print-config shows"},
      {"--configs baseline,baseline", 3, "differ"},
      {"--set stepz=3", 3, "did you mean 'steps'"},
      {"--set hiden_size=3", 3, "did you mean 'hidden_size'"},
      {"--protocol loose", 3, "seed or strict"},
      {"--optimizer sgd", 3, "muon or adamw"},
      {"--precision fp8", 3, "fp32 or bf16"},
      {"--steps 0", 3, "steps"},
      {"--steps -5", 3, "steps"},
      {"--steps 1e3", 3, "whole number"},
      {"--steps 99999999999999999999", 3, "steps"},
      {"--batch nan", 3, "whole number"},
      {"--seeds 1,x", 3, "seeds"},
      {"--set adamw_lr=nan", 3, "finite"},
      {"--set adamw_lr=1e400", 3, "adamw_lr"},
      {"--set muon_lr=-1", 3, "muon_lr"},
      {"--set top_k=5", 3, "top_k must be at most experts (4), found 5"},
      {"--set heads=5", 3, "multiple of heads"},
      {"--set heads=32", 3, "even"},
      {"--configs lora --set qk_rope_head_dim=7", 3, "qk_rope_head_dim must be even"},
      {"--seq 64", 3, "max_seq_len"},
      {"--set top_k=5 --set heads=5", 3, "top_k"},
      {"--data " + (scratch / "missing.bin"), 5, "missing.bin"},
      {"--data " + scratch.path.string(), 5, scratch.path.string()},
      {"--data " + (scratch / "a_file"), 4, "a_file"},
      {"--data " + (scratch / "gzip.bin"), 4, "gzip"},
      {"--data " + (scratch / "short.bin"), 4, "short.bin"},
      {"--data " + (scratch / "beyond.bin"), 4, "128"},
      {"--memory-limit 0.000001", 6, "out of memory"},
      {"--set adamw_lr=100 --set muon_lr=100 --set clip_norm=1e9 --steps 400 --set eval_every=400", 7, "no update was applied"},
  };
  for (const Case& c : cases) {
    fs::remove_all(out);
    const Answer answer = run(kTiny + c.arguments + " --out " + out);
    CHECK_MESSAGE(answer.code == c.code, c.arguments << " exited with " << answer.code << ": " << answer.text);
    CHECK_MESSAGE(answer.text.find(c.says) != std::string::npos, c.arguments << " does not say '" << c.says << "': " << answer.text);
    if (c.code <= 5) CHECK_MESSAGE(!fs::exists(out), c.arguments << " left a folder");
  }
  CHECK(run(kTiny + "--out " + (scratch / "a_file")).code == 2);
  CHECK(run(kTiny + "--out ''").text.find("--out: expected a name") != std::string::npos);
  CHECK(run(kTiny + "--out " + (scratch / "a_file/run")).code == 5);
  const Answer both = run(kTiny + "--set top_k=5 --set heads=5 --dry-run");
  CHECK_MESSAGE(both.text.find("multiple of heads") != std::string::npos, "all violations at once: " << both.text);
}

TEST_CASE("a stop signal ends the run with what is done written") {
  const Scratch scratch;
  const std::string out = scratch / "run";
  // The signal comes once the run has written its first points.
  const Answer answer = run(kTiny + "--steps 1000000 --set eval_every=1000000 --out " + out +
                            " & pid=$!; while [ ! -s " + out + "/metrics.jsonl ] && kill -0 $pid; do sleep 0.05; done; "
                            "kill -INT $pid; wait $pid");
  CHECK_MESSAGE(answer.code == 130, answer.text);
  const Json results = read_json(out + "/results.json");
  CHECK(results["status"] == "interrupted");
  REQUIRE(results["runs"].size() == 1);
  CHECK(results["runs"][0]["status"] == "interrupted");
  CHECK(results["runs"][0]["micro_steps"].get<int64_t>() > 0);
}

TEST_CASE("a continued experiment is the one that was never interrupted") {
  const Scratch scratch;
  const std::string whole = scratch / "whole", out = scratch / "cut", settings = kTiny + "--configs baseline,lora --seeds 1,2 ";
  REQUIRE(run(settings + "--out " + whole).code == 0);
  fs::copy(whole, out);
  // baseline 2 was interrupted half-way and lora 1 is gone; baseline 1 and lora 2 are complete.
  Json results = read_json(out + "/results.json");
  results["status"] = "interrupted";
  results["runs"][2]["status"] = "interrupted";
  results["runs"][2]["val_loss"] = 9;
  results["runs"][0]["training_time_minutes"] = 77;  // shows that this run is kept
  results["runs"].erase(1);
  std::ofstream(out + "/results.json") << results.dump(2);
  std::ofstream(out + "/metrics.jsonl", std::ios::app) << R"({"kind":"train","experi)";

  const auto points = [](const std::string& folder) {
    std::ifstream in(folder + "/metrics.jsonl");
    std::vector<std::string> points;
    for (std::string line; std::getline(in, line);) {
      Json point = Json::parse(line);
      point.erase("seconds");
      points.push_back(point.dump());
    }
    std::sort(points.begin(), points.end());
    return points;
  };
  const auto before = read_json(out + "/results.json");
  const Answer other = run(settings + "--steps 9 --resume --out " + out);
  CHECK(other.code == 3);
  CHECK_MESSAGE(other.text.find("recipe.steps is 8 in") != std::string::npos, other.text);
  CHECK(read_json(out + "/results.json") == before);
  const Json env = read_json(out + "/env.json");
  Json first = env;
  first["gemm_algorithms"] = "first";  // as --deterministic leaves it on a GPU
  std::ofstream(out + "/env.json") << first;
  const Answer timed = run(settings + "--resume --out " + out);
  CHECK(timed.code == 3);
  CHECK_MESSAGE(timed.text.find("gemm_algorithms is \"first\" in") != std::string::npos, timed.text);
  std::ofstream(out + "/env.json") << env;
  CHECK(run(settings + "--out " + out).code == 2);
  CHECK(run(settings + "--resume").code == 2);
  CHECK(run(settings + "--resume --out " + (scratch / "nowhere")).code == 2);

  const Answer answer = run(settings + "--resume --out " + out);
  REQUIRE_MESSAGE(answer.code == 0, answer.text);
  CHECK_MESSAGE(answer.text.find("2 of 4 runs are complete") != std::string::npos, answer.text);
  const Json expected = read_json(whole + "/results.json"), found = read_json(out + "/results.json");
  CHECK(found["status"] == "complete");
  REQUIRE(found["runs"].size() == 4);
  for (const Json& e : expected["runs"])
    for (const Json& f : found["runs"])
      if (e["experiment_name"] == f["experiment_name"] && e["seed"] == f["seed"]) {
        CHECK(e["val_loss"] == f["val_loss"]);
        CHECK(e["train_loss"] == f["train_loss"]);
        CHECK(e["expert_load"] == f["expert_load"]);
        CHECK((f["training_time_minutes"] == 77) == (f["experiment_name"] == "baseline" && f["seed"] == 1));
      }
  CHECK(points(out) == points(whole));
}

TEST_CASE("counting, printing and planning train nothing") {
  const Answer count = run("--count-params --preset exp1");
  CHECK(count.code == 0);
  for (const char* number : {"438906624", "427605504", "444821504"})
    CHECK_MESSAGE(count.text.find(number) != std::string::npos, count.text);
  const Answer print = run(kTiny + "--print-config --set dropout=0.25");
  CHECK(Json::parse(print.text)["models"]["baseline"]["dropout"] == 0.25);
  CHECK(run(kTiny + "--dry-run").text.find("windows") != std::string::npos);
  CHECK(run("--help").code == 0);
}

TEST_SUITE("cuda") {
  TEST_CASE("the tiny preset trains on the GPU as on the CPU") {
    const Scratch scratch;
    std::vector<Json> runs;
    for (const char* device : {"cpu", "cuda"}) {
      const Answer answer = run(std::string("--preset tiny --precision fp32 --device ") + device + " --out " + (scratch / device));
      REQUIRE_MESSAGE(answer.code == 0, answer.text);
      runs.push_back(read_json(scratch / (std::string(device) + "/results.json"))["runs"]);
    }
    for (size_t i = 0; i < runs[0].size(); ++i)
      CHECK(runs[0][i]["val_loss"].get<double>() == doctest::Approx(runs[1][i]["val_loss"].get<double>()).epsilon(1e-3));
  }
  TEST_CASE("a run with captured steps writes what a run with eager ones writes") {
    const Scratch scratch;
    std::vector<std::vector<Json>> points;
    for (const char* graphs : {"0", "1"}) {
      const std::string out = scratch / graphs;
      const Answer answer = run(std::string("--preset tiny --precision fp32 --device cuda --configs baseline --steps 11 --set graphs=") +
                                graphs + " --out " + out);
      REQUIRE_MESSAGE(answer.code == 0, answer.text);
      std::ifstream in(out + "/metrics.jsonl");
      std::vector<Json>& of_run = points.emplace_back();
      for (std::string line; std::getline(in, line);) of_run.push_back(Json::parse(line));
    }
    REQUIRE(points[0].size() == points[1].size());
    for (size_t i = 0; i < points[0].size(); ++i)
      for (const auto& [key, value] : points[0][i].items()) {
        CAPTURE(key);
        const Json& other = points[1][i].at(key);
        if (key == "seconds" || key == "memory_gb" || key == "val_accuracy") continue;
        // In two processes the matrix products may use different algorithms.
        if (value.is_number_float())
          CHECK(value.get<double>() == doctest::Approx(other.get<double>()).epsilon(1e-3));
        else
          CHECK(value == other);
      }
  }
  TEST_CASE("a GPU memory limit that is too small is an error that explains itself") {
    const Scratch scratch;
    const Answer answer = run("--preset tiny --device cuda --memory-limit 0.001 --out " + (scratch / "run"));
    CHECK(answer.code == 6);
    CHECK_MESSAGE(answer.text.find("out of memory on the GPU") != std::string::npos, answer.text);
  }
}
