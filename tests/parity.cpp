// parity: the model, its gradients and both optimizers against values from the original PyTorch code (a file of
// tests/reference's form). Prints the worst errors; exit code 0 only when all are within tolerance.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "engine/optim/adamw.h"
#include "engine/optim/muon.h"
#include "model/transformer.h"
#include "tests/safetensors.h"

using namespace weft;

namespace {

constexpr int kOutOfTolerance = 1, kSkipped = 77;

struct Tolerances {
  double logits, loss, gradient, update;
};
constexpr double kAny = std::numeric_limits<double>::infinity();
constexpr Tolerances kF32 = {2e-5, 2e-5, 1e-4, 1e-2};
constexpr Tolerances kBf16 = {3e-2, 5e-3, kAny, kAny};  // gradients and updates are shown, not judged

struct Sizes {
  Config config;
  int64_t batch;
};

Sizes read_sizes(const std::string& path, const std::string& name) {
  std::ifstream in(path);
  if (!in) fail(Fault::io, "{}: cannot be opened", path);
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(in);
  } catch (const nlohmann::json::exception& e) {
    fail(Fault::data, "{}: not JSON: {}", path, e.what());
  }
  const auto size = [&](const char* key) {
    if (!json.contains(key) || !json[key].is_number_integer()) fail(Fault::data, "{}: no whole number '{}'", path, key);
    return std::to_string(json[key].get<int64_t>());
  };
  Overrides sizes = {{"hidden_size", size("d")}, {"heads", size("h")},      {"layers", size("l")},
                     {"ffn_size", size("ff")},   {"experts", size("e")},    {"vocab_size", size("v")},
                     {"max_seq_len", size("t")}, {"dropout", "0"},          {"router_noise", "0"}};
  if (attention_row(name).latent) sizes.insert(sizes.end(), {{"q_lora_rank", size("q")}, {"kv_lora_rank", size("kv")}});
  if (name == "enhanced") sizes.insert(sizes.end(), {{"qk_rope_head_dim", size("rope")}, {"v_head_dim", size("vd")}});
  return {with_attention(Config{}, name, sizes), parse_integer("b", size("b"), 1, 1 << 20)};
}

// The tensors of a fixture, each asked for once or more; what was never asked for is an error.
class Fixture {
 public:
  explicit Fixture(const std::string& path) : path_(path), tensors_(read_safetensors(path)) {}
  Tensor operator()(const std::string& name, const Shape& shape, DType dtype = DType::f32) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail(Fault::data, "{}: tensor {} is missing", path_, name);
    const Tensor& t = found->second;
    if (t.shape() != shape || t.dtype() != dtype)
      fail(Fault::data, "{}: tensor {} is {} {}, the model needs {} {}", path_, name, name_of(t.dtype()),
           t.shape().str(), name_of(dtype), shape.str());
    asked_.insert(name);
    return t;
  }
  void check_all_asked() const {
    for (const auto& [name, tensor] : tensors_)
      if (!asked_.contains(name)) fail(Fault::data, "{}: tensor {} has no place in this model", path_, name);
  }

 private:
  std::string path_;
  std::map<std::string, Tensor> tensors_;
  std::set<std::string> asked_;
};

// A parameter as the fixture has it: the whole, or one matrix of a stack of experts.
struct Piece {
  std::string name;
  Shape shape;
  int64_t first;  // element of the parameter
};
std::vector<Piece> pieces_of(const Parameter& p) {
  if (p.shape.rank() < 3) return {{p.name, p.shape, 0}};
  const std::string stack = ".experts.";
  const size_t at = p.name.find(stack) + stack.size();
  std::vector<Piece> pieces;
  const Shape matrix{p.shape[1], p.shape[2]};
  for (int64_t e = 0; e < p.shape[0]; ++e)
    pieces.push_back({p.name.substr(0, at) + std::to_string(e) + "." + p.name.substr(at), matrix, e * matrix.numel()});
  return pieces;
}

struct Worst {
  double error = 0;
  std::string name = "-";
  void take(double e, const std::string& of) {
    if (e > error || std::isnan(e)) error = std::isnan(e) ? kAny : e, name = of;
  }
};

// |a - b| / |b|; 0 when both are 0.
double relative_norm(const float* a, const float* b, int64_t n) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

class Parity {
 public:
  Parity(const Sizes& sizes, const std::string& fixture, Device device, DType precision)
      : fixture_(fixture), device_(device), params_(precision), model_(sizes.config, Scope(params_, device, 0)),
        shape_{sizes.batch, sizes.config.max_seq_len}, mode_{.training = true, .compute = precision} {
    tokens_ = fixture_("tokens", shape_, DType::i32).to(device);
    targets_ = fixture_("targets", shape_, DType::i32).to(device);
    params_.sum_gradients(GradientSums::as_given);
    load();
  }

  // Whether all is within tolerance.
  bool run(const Tolerances& tolerances) {
    compare_forward();
    step_loss();
    compare_gradients();
    Muon muon(params_.of({Kind::matrix}));
    muon.step(0.01);
    compare_updates("muon", muon_);
    load();
    AdamW adamw(params_.all());
    for (int i = 0; i < 3; ++i) {
      params_.clear_grads();
      step_loss();
      adamw.step(1e-3);
    }
    compare_updates("adamw", adamw_);
    fixture_.check_all_asked();

    bool good = true;
    const auto report = [&](const char* what, const Worst& worst, double tolerance) {
      const bool within = worst.error <= tolerance;
      good = good && within;
      const std::string verdict =
          tolerance == kAny ? "not judged" : fmt::format("{} {:.0e}", within ? "within" : "BEYOND", tolerance);
      fmt::print("{:10} {:.3e}  {}  {}\n", what, worst.error, verdict, worst.name);
    };
    report("logits", logits_, tolerances.logits);
    report("loss", loss_, tolerances.loss);
    report("gradients", gradients_, tolerances.gradient);
    report("adamw", adamw_, tolerances.update);
    report("muon", muon_, tolerances.update);
    return good;
  }

 private:
  Tensor reference(const std::string& kind, const Piece& piece) {
    return fixture_(kind + "." + piece.name, piece.shape);
  }

  void load() {
    for (const Parameter& p : params_.list()) {
      std::vector<float> values(static_cast<size_t>(p.shape.numel()));
      for (const Piece& piece : pieces_of(p)) {
        const Tensor t = reference("param", piece);
        std::copy_n(t.data<float>(), t.numel(), values.begin() + piece.first);
      }
      set_master_value(p.value, Tensor::from(values, p.shape, device_));
    }
  }

  void step_loss() { backward(model_.loss(tokens_, targets_, mode_).total); }

  void compare_forward() {
    NoGrad no_grad;
    const Output out = model_(tokens_, mode_);
    const std::vector<float> logits = cast(out.logits, DType::f32).to_vector<float>();
    const Tensor expected = fixture_("logits", out.logits.shape());
    const float* values = expected.data<float>();
    double largest = 0;
    for (size_t i = 0; i < logits.size(); ++i) largest = std::max(largest, std::abs(static_cast<double>(values[i])));
    const std::string what = "largest difference over largest value";
    for (size_t i = 0; i < logits.size(); ++i)
      logits_.take(std::abs(static_cast<double>(logits[i]) - values[i]) / largest, what);
    const auto one = [&](const char* name, const Tensor& found) {
      loss_.take(std::abs(found.item() - fixture_(name, {1}).item()), name);
    };
    one("ce_loss", cross_entropy(out.logits, targets_));
    one("aux_loss", out.aux);
  }

  void compare_gradients() {
    for (const Parameter& p : params_.list()) {
      check(static_cast<bool>(p.value.grad()), "{} has no gradient", p.name);
      const std::vector<float> grad = cast(p.value.grad(), DType::f32).to_vector<float>();
      for (const Piece& piece : pieces_of(p)) {
        const Tensor expected = reference("grad", piece);
        gradients_.take(relative_norm(grad.data() + piece.first, expected.data<float>(), expected.numel()), piece.name);
      }
    }
  }

  void compare_updates(const std::string& kind, Worst& worst) {
    for (const Parameter& p : params_.list()) {
      if (kind == "muon" && p.kind != Kind::matrix) continue;
      const std::vector<float> after = master_value(p.value).to_vector<float>();
      for (const Piece& piece : pieces_of(p)) {
        const Tensor before = reference("param", piece), expected = reference(kind, piece);
        std::vector<float> found_update, expected_update;
        for (int64_t i = 0; i < before.numel(); ++i) {
          found_update.push_back(after[static_cast<size_t>(piece.first + i)] - before.data<float>()[i]);
          expected_update.push_back(expected.data<float>()[i] - before.data<float>()[i]);
        }
        worst.take(relative_norm(found_update.data(), expected_update.data(), before.numel()), piece.name);
      }
    }
  }

  Fixture fixture_;
  Device device_;
  Params params_;
  Transformer model_;
  Shape shape_;
  Mode mode_;
  Tensor tokens_, targets_;
  Worst logits_, loss_, gradients_, adamw_, muon_;
};

int run(int argc, char** argv) {
  std::string fixture, sizes, name, device = "cpu", precision = "fp32";
  CLI::App app("Compares the model with reference values of the original PyTorch code");
  app.add_option("--fixture", fixture, "reference values (.safetensors)")->required();
  app.add_option("--sizes", sizes, "their sizes (.json)")->required();
  app.add_option("--config", name, "an attention configuration: " + attention_list())->required();
  app.add_option("--device", device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--precision", precision)->check(CLI::IsMember({"fp32", "bf16"}));
  CLI11_PARSE(app, argc, argv);

  if (device == "cuda" && !cuda_available()) {
    fmt::print("SKIPPED: no usable GPU\n");
    return kSkipped;
  }
  if (device == "cuda") require_cuda();
  Parity parity(read_sizes(sizes, name), fixture, device == "cuda" ? Device::cuda : Device::cpu,
                precision == "bf16" ? DType::bf16 : DType::f32);
  fmt::print("{} on {} in {}\n", name, device, precision);
  return parity.run(precision == "bf16" ? kBf16 : kF32) ? 0 : kOutOfTolerance;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("parity", [&] { return run(argc, argv); });
}
