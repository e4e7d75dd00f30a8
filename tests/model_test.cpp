// The model: its parameter counts, its configuration's checks, what it shares and hides, that it can learn, and latent
// attention in general against Hugging Face transformers' DeepSeek-V3.
#include "model/transformer.h"

#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <iterator>

#include "engine/optim/adamw.h"
#include "engine/optim/muon.h"
#include "model/latent_attention.h"
#include "tests/safetensors.h"

using namespace weft;

namespace {

const std::vector<std::string> kConfigurations = [] {
  std::vector<std::string> names;
  for (const AttentionRow& row : attention_table()) names.push_back(row.name);
  return names;
}();

Config small(const std::string& name) {
  return with_attention(Config{}, name,
                        {{"hidden_size", "32"}, {"heads", "2"}, {"layers", "2"}, {"ffn_size", "64"}, {"experts", "4"},
                         {"vocab_size", "64"}, {"max_seq_len", "16"}, {"dropout", "0"}, {"router_noise", "0"}});
}

Tensor ids(const Shape& shape, int64_t vocabulary, uint64_t stream, Device device = Device::cpu) {
  std::vector<int32_t> values;
  for (int64_t i = 0; i < shape.numel(); ++i) {
    const uint64_t id = random_below({1, stream}, static_cast<uint64_t>(i), static_cast<uint64_t>(vocabulary));
    values.push_back(static_cast<int32_t>(id));
  }
  return Tensor::from(values, shape, device);
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(static_cast<double>(a[i]) - b[i]));
  return worst;
}

double relative_difference(const Tensor& a, const Tensor& b) {
  REQUIRE(a.shape() == b.shape());
  const std::vector<float> x = a.to_vector<float>(), y = b.to_vector<float>();
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(static_cast<double>(x[i]) - y[i], 2);
    norm += std::pow(static_cast<double>(y[i]), 2);
  }
  return std::sqrt(difference / norm);
}

std::string refusal(const std::string& field, const std::string& text) {
  Config c;
  try {
    set_field(c, field, text);
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::config);
    return e.what();
  }
  return "accepted";
}

double overfit(const std::string& name, Device device, DType compute) {
  const Config c = small(name);
  Params params(compute);
  const Transformer model(c, Scope(params, device, 42));
  const Tensor tokens = ids({2, 16}, c.vocab_size, 1, device), targets = ids({2, 16}, c.vocab_size, 2, device);
  Muon muon(params.of({Kind::matrix}));
  AdamW adamw(params.of({Kind::vector, Kind::embedding}), {.weight_decay = 0});
  double loss = 0;
  for (int step = 0; step < 150; ++step) {
    params.clear_grads();
    const Loss l = model.loss(tokens, targets, {.training = true, .compute = compute});
    loss = l.ce.item();
    if (loss < 0.05) break;
    backward(l.total);
    muon.step(0.02);
    adamw.step(0.01);
  }
  return loss;
}

}  // namespace

TEST_CASE("parameter counts of the experiment") {
  CHECK(parameter_count(with_attention({}, "baseline")) == 438'906'624);
  CHECK(parameter_count(with_attention({}, "lora")) == 427'605'504);
  CHECK(parameter_count(with_attention({}, "enhanced")) == 444'821'504);
}

TEST_CASE("parameters by part") {
  const auto parts_of = [](const char* name) {
    std::vector<int64_t> counts;
    for (const Part& part : parameters_by_part(counted_params(with_attention({}, name)))) counts.push_back(part.parameters);
    return counts;
  };
  CHECK(parts_of("baseline") == std::vector<int64_t>{37'748'736, 23'592'960, 377'487'360, 61'440, 16'128});
  // A bias is attention's, q_a's and kv_a's norms are norms.
  const int64_t block_norms = 21 * 768;
  CHECK(parts_of("lora") == std::vector<int64_t>{37'748'736, 427'605'504 - 37'748'736 - 377'487'360 - 61'440 - block_norms - 10 * 384,
                                                 377'487'360, 61'440, block_norms + 10 * 384});
}

TEST_CASE("costs") {
  const Config baseline = with_attention({}, "baseline"), lora = with_attention({}, "lora");
  CHECK(kv_cache_bytes_per_token(baseline, 2) == 2 * 768 * 10 * 2);
  CHECK(kv_cache_bytes_per_token(lora, 2) == (256 + 64) * 10 * 2);
  const int64_t idle = 10 * 6 * 2 * 768 * 3072;  // six of eight experts
  CHECK(active_parameter_count(baseline) == 438'906'624 - idle);
  const double weights = 438'906'624 - idle - 21 * 768;
  CHECK(flops_per_token(baseline, 512) == doctest::Approx(6 * (weights + 10 * 2 * 768 * 256.0)));
}

TEST_CASE("the enhanced configuration is what the experiment says") {
  const Config c = with_attention({}, "enhanced");
  CHECK(c.q_lora_rank == 128);
  CHECK(c.kv_lora_rank == 256);
  CHECK(c.qk_rope_head_dim == 128);
  CHECK(c.v_head_dim == 192);
  CHECK(c.attention_bias);
  CHECK(c.rope_scaling == "linear");
  CHECK(c.rope_factor == 2);
  CHECK(c.rms_norm_eps == 1e-6);
}

TEST_CASE("overrides have the last word, and pass over what a configuration lacks") {
  const Overrides overrides = {{"hidden_size", "96"}, {"kv_lora_rank", "40"}};
  CHECK(with_attention({}, "lora", overrides).kv_lora_rank == 40);
  CHECK(with_attention({}, "lora", overrides).q_lora_rank == 16);
  CHECK(with_attention({}, "baseline", overrides).kv_lora_rank == 0);
}

TEST_CASE("a setting refuses what is no sound value") {
  CHECK(refusal("hidden_sise", "1").find("did you mean 'hidden_size'") != std::string::npos);
  CHECK(refusal("zzzzzzzz", "1") == "unknown setting 'zzzzzzzz'");
  CHECK(refusal("attention", "lor").find(attention_list()) != std::string::npos);
  CHECK(refusal("rope_scaling", "cubic").find("yarn") != std::string::npos);
  for (const char* text : {"", " 1", "1 ", "abc", "1e3", "12abc", "0x10", "nan", "1.5"})
    CHECK_MESSAGE(refusal("layers", text).find("whole number") != std::string::npos, text);
  for (const char* text : {"0", "-1", "99999999999", "99999999999999999999999999"})
    CHECK_MESSAGE(refusal("layers", text).find("layers must be from 1 to 1000") != std::string::npos, text);
  for (const char* text : {"nan", "inf", "-inf", "", "0.1x", "1,5"})
    CHECK_MESSAGE(refusal("dropout", text).find("finite number") != std::string::npos, text);
  for (const char* text : {"-0.1", "1", "1e400"})
    CHECK_MESSAGE(refusal("dropout", text).find("dropout must be from 0 to 0.99") != std::string::npos, text);
  CHECK(refusal("attention_bias", "maybe").find("neither true nor false") != std::string::npos);
}

TEST_CASE("every field reads back what was written") {
  Config c = with_attention({}, "enhanced");
  Config copy;
  for (const ConfigField& f : config_fields()) set_field(copy, f.name, get_field(c, f.name));
  CHECK(to_json(copy) == to_json(c));
}

TEST_CASE("all violations are listed at once") {
  Config c = with_attention({}, "lora");
  c.top_k = 9;
  c.hidden_size = 770;
  c.qk_rope_head_dim = 63;
  c.kv_lora_rank = 0;
  c.dropout = std::nan("");
  c.rope_scaling = "yarn";
  const std::vector<std::string> found = violations(c);
  CHECK(found.size() == 6);
  std::string all;
  try {
    validate(c);
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::config);
    all = e.what();
  }
  for (const char* name :
       {"top_k", "hidden_size", "qk_rope_head_dim", "kv_lora_rank", "dropout", "rope_original_length"})
    CHECK_MESSAGE(all.find(name) != std::string::npos, name);
  for (const std::string& name : kConfigurations) CHECK(violations(with_attention({}, name)).empty());
  Config none;
  none.heads = 0;
  CHECK(violations(none).size() == 2);
}

TEST_CASE("configurations share the initial weights of what they share") {
  Params baseline, enhanced;
  const Transformer a(small("baseline"), Scope(baseline, Device::cpu, 7));
  const Transformer b(small("enhanced"), Scope(enhanced, Device::cpu, 7));
  int shared = 0;
  for (const Parameter& p : baseline.list())
    if (const Parameter* other = enhanced.find(p.name)) {
      ++shared;
      CHECK_MESSAGE(p.value.to_vector<float>() == other->value.to_vector<float>(), p.name);
    }
  CHECK(shared == 1 + 2 * 3 + 1);  // embedding, each block's gate and two stacks of experts, final norm
  CHECK(baseline.find("transformer_blocks.0.feed_forward.experts.linear1.weight")->value.to_vector<float>() !=
        baseline.find("transformer_blocks.1.feed_forward.experts.linear1.weight")->value.to_vector<float>());
}

TEST_CASE("no logit sees a later token") {
  for (const std::string& name : kConfigurations) {
    const Config c = small(name);
    Params params;
    const Transformer model(c, Scope(params, Device::cpu, 3));
    const Tensor tokens = ids({1, 16}, c.vocab_size, 5);
    NoGrad no_grad;
    const std::vector<float> before = model(tokens, {}).logits.to_vector<float>();
    tokens.data<int32_t>()[10] = (tokens.data<int32_t>()[10] + 1) % 64;
    const std::vector<float> after = model(tokens, {}).logits.to_vector<float>();
    const auto cut = static_cast<int64_t>(10 * c.vocab_size);
    CAPTURE(name);
    CHECK(largest_difference({before.begin(), before.begin() + cut}, {after.begin(), after.begin() + cut}) < 1e-5);
    CHECK(largest_difference({before.begin() + cut, before.end()}, {after.begin() + cut, after.end()}) > 1e-3);
  }
}

TEST_CASE("training draws from the step's random sequence, evaluation from none") {
  Config c = small("baseline");
  c.dropout = c.router_noise = 0.1;
  Params params;
  const Transformer model(c, Scope(params, Device::cpu, 3));
  const Tensor tokens = ids({2, 16}, c.vocab_size, 1), targets = ids({2, 16}, c.vocab_size, 2);
  const auto training = [&](uint64_t step) {
    Rng rng(42, step);
    return model.loss(tokens, targets, {.training = true, .rng = &rng}).total.item();
  };
  CHECK(training(1) == training(1));
  CHECK(training(1) != training(2));
  const Loss evaluation = model.loss(tokens, targets, {});
  CHECK(!evaluation.aux);
  CHECK(evaluation.total.item() == evaluation.ce.item());
  CHECK(evaluation.ce.item() == doctest::Approx(std::log(64)).epsilon(0.1));
  CHECK_THROWS_AS(model.loss(tokens, targets, {.training = true}), Error);
}

TEST_CASE("each configuration overfits one batch") {
  for (const std::string& name : kConfigurations)
    for (const DType compute : {DType::f32, DType::bf16}) CHECK_MESSAGE(overfit(name, Device::cpu, compute) < 0.05, name);
}

TEST_CASE("a damaged file of reference values is refused") {
  const std::string whole = [] {
    std::ifstream in(WEFT_SOURCE_DIR "/tests/reference/deepseek_attention.safetensors", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }();
  const auto refused = [](const std::string& content) {
    const std::string path = WEFT_BINARY_DIR "/damaged.safetensors";
    std::ofstream(path, std::ios::binary) << content;
    try {
      read_safetensors(path);
    } catch (const Error& e) {
      return e.fault() == Fault::data && std::string(e.what()).find(path) == 0;
    }
    return false;
  };
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{100}, whole.size() - 1})
    CHECK_MESSAGE(refused(whole.substr(0, size)), size);
  CHECK(refused(std::string(20, '\xff')));
  CHECK(refused(std::string("\4\0\0\0\0\0\0\0[1,2", 12)));
  CHECK_THROWS_AS(read_safetensors("no such file"), Error);
}

// Copies lie one after another, and gradients are parts of one product: each leaf's is nobody else's all the same.
void check_joined_layers(Device device) {
  Params params(DType::bf16), apart_params;
  const auto layers = [](Scope s) {
    return std::vector<Linear>{Linear(s / "a", 24, 7, 1, Bias::with), Linear(s / "b", 24, 5, 1, Bias::with)};
  };
  const JoinedLinear joined(Scope(params, device, 5), layers(Scope(params, device, 5)));
  const std::vector<Linear> apart = layers(Scope(apart_params, device, 5));
  params.sum_gradients(GradientSums::as_given);
  const std::vector<Parameter>& list = params.list();  // weight and bias of each
  CHECK(Tensor::joined({kept_copy(list[0].value), kept_copy(list[2].value)}));
  CHECK(Tensor::joined({kept_copy(list[1].value), kept_copy(list[3].value)}));
  CHECK(!Tensor::joined({list[0].value, list[2].value}));

  const Tensor x = Tensor::empty({2, 11, 24}, DType::bf16, device);
  fill_normal(x, 1, {1, 2});
  const auto gradients_times = [&](double times) {
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor expected = scale(apart_params.list()[i].value.grad(), times);
      CHECK(list[i].value.grad().dtype() == DType::bf16);
      CHECK_MESSAGE(relative_difference(cast(list[i].value.grad(), DType::f32), expected) < 0.01, list[i].name);
    }
  };
  const Tensor a = apart[0](x), b = apart[1](x);
  backward(add(sum(mul(a, a)), sum(mul(b, b))));
  for (const double times : {1, 2}) {
    const Tensor y = joined(x);
    CHECK(y.shape() == Shape{2, 11, 12});
    backward(sum(mul(y, y)));
    gradients_times(times);
  }
}

TEST_CASE("joined layers are the layers, on the CPU") { check_joined_layers(Device::cpu); }

TEST_CASE("latent attention in general is DeepSeek-V3's") {
  const auto fixture = read_safetensors(WEFT_SOURCE_DIR "/tests/reference/deepseek_attention.safetensors");
  Config common = with_attention({}, "lora");
  common.hidden_size = 32, common.heads = 2, common.max_seq_len = 24, common.dropout = 0;
  common.kv_lora_rank = 20, common.qk_nope_head_dim = 12, common.qk_rope_head_dim = 16, common.v_head_dim = 10;
  Config yarn = common, linear = common, dynamic = common;
  yarn.q_lora_rank = 0, yarn.rope_scaling = "yarn", yarn.rope_base = 100, yarn.rope_factor = 4;
  yarn.rope_beta_fast = 4, yarn.rope_beta_slow = 0.5, yarn.rope_mscale = 1, yarn.rope_mscale_all_dim = 0.8;
  yarn.rope_original_length = 64;
  linear.q_lora_rank = 14, linear.attention_bias = true, linear.rope_scaling = "linear", linear.rope_factor = 2;
  dynamic.q_lora_rank = 14, dynamic.rope_scaling = "dynamic", dynamic.rope_factor = 3;
  dynamic.rope_original_length = 16;
  const std::pair<std::string, Config> cases[] = {{"yarn", yarn}, {"linear", linear}, {"dynamic", dynamic}};

  for (const auto& [name, config] : cases) {
    CAPTURE(name);
    REQUIRE(violations(config).empty());
    const auto value = [&, name = name](const std::string& of) { return fixture.at(name + "." + of); };
    Params params;
    const LatentAttention attention(config, Scope(params, Device::cpu, 0), Rope(rope_options(config), 24, Device::cpu));
    for (const Parameter& p : params.list()) copy_into(p.value, value("param." + p.name));
    const Tensor x = leaf(value("x"));
    const Tensor y = attention(x, {});
    CHECK(relative_difference(y, value("y")) < 1e-5);
    backward(sum(mul(y, value("dy"))));
    CHECK(relative_difference(x.grad(), value("dx")) < 1e-5);
    for (const Parameter& p : params.list())
      CHECK_MESSAGE(relative_difference(p.value.grad(), value("grad." + p.name)) < 1e-5, p.name);
  }
}

TEST_SUITE("cuda") {
  TEST_CASE("joined layers are the layers, on the GPU") { check_joined_layers(Device::cuda); }

  TEST_CASE("each configuration overfits one batch on the GPU") {
    for (const std::string& name : kConfigurations)
      for (const DType compute : {DType::f32, DType::bf16})
        CHECK_MESSAGE(overfit(name, Device::cuda, compute) < 0.05, name);
  }

  TEST_CASE("the GPU's loss and gradients are the CPU's, at sizes that fit no tile") {
    for (const std::string& name : kConfigurations) {
      CAPTURE(name);
      const Config c = with_attention(
          Config{}, name,
          {{"hidden_size", "36"}, {"heads", "3"}, {"layers", "2"}, {"ffn_size", "50"}, {"experts", "5"},
           {"vocab_size", "101"}, {"max_seq_len", "70"}, {"dropout", "0"}, {"router_noise", "0"}, {"q_lora_rank", "10"},
           {"kv_lora_rank", "14"}, {"qk_rope_head_dim", "6"}, {"v_head_dim", "10"}, {"init_std", "0.2"}});
      Params cpu, gpu;
      const Transformer on_cpu(c, Scope(cpu, Device::cpu, 3)), on_gpu(c, Scope(gpu, Device::cuda, 3));
      for (const Parameter& p : cpu.list()) copy_into(gpu.find(p.name)->value, p.value.to(Device::cuda));
      const Tensor tokens = ids({3, 70}, c.vocab_size, 1), targets = ids({3, 70}, c.vocab_size, 2);
      const Loss a = on_cpu.loss(tokens, targets, {.training = true});
      const Loss b = on_gpu.loss(tokens.to(Device::cuda), targets.to(Device::cuda), {.training = true});
      CHECK(b.total.item() == doctest::Approx(a.total.item()).epsilon(1e-5));
      backward(a.total);
      backward(b.total);
      for (const Parameter& p : cpu.list())
        CHECK_MESSAGE(relative_difference(gpu.find(p.name)->value.grad(), p.value.grad()) < 1e-4, p.name);
    }
  }

  TEST_CASE("bf16 computes what f32 does, nearly") {
    for (const std::string& name : kConfigurations) {
      const Config c = small(name);
      Params params;
      const Transformer model(c, Scope(params, Device::cuda, 3));
      const Tensor tokens = ids({2, 16}, c.vocab_size, 1, Device::cuda);
      const Tensor targets = ids({2, 16}, c.vocab_size, 2, Device::cuda);
      const double exact = model.loss(tokens, targets, {}).ce.item();
      CHECK_MESSAGE(std::abs(model.loss(tokens, targets, {.compute = DType::bf16}).ce.item() - exact) < 0.02, name);
    }
  }
}
