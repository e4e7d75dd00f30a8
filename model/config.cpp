#include "model/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "engine/check.h"
#include "model/attention.h"

namespace weft {
namespace {

const ConfigField* find_field(std::string_view name) {
  for (const ConfigField& f : config_fields())
    if (f.name == name) return &f;
  return nullptr;
}

const ConfigField& field(const std::string& name) {
  if (const ConfigField* f = find_field(name)) return *f;
  std::vector<std::string> names;
  for (const ConfigField& f : config_fields()) names.push_back(f.name);
  const std::string near = nearest_name(name, names);
  fail(Fault::config, "unknown setting '{}'{}", name, near.empty() ? "" : "; did you mean '" + near + "'?");
}

template <class T>
T parse(std::string_view name, std::string_view text, const char* what, double min, double max) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error != std::errc::invalid_argument && end == text.data() + text.size() && !text.empty();
  if (!whole || (error == std::errc{} && !std::isfinite(static_cast<double>(value))))
    fail(Fault::config, "{}: '{}' is not {}", name, text, what);
  if (error != std::errc{} || value < static_cast<T>(min) || value > static_cast<T>(max))
    fail(Fault::config, "{} must be from {} to {}, found {}", name, static_cast<T>(min), static_cast<T>(max), text);
  return value;
}

bool known_scaling(const std::string& s) { return s == "none" || s == "linear" || s == "dynamic" || s == "yarn"; }

}  // namespace

const std::vector<ConfigField>& config_fields() {
  static const std::vector<ConfigField> fields = {
      {"attention", &Config::attention, 0, 0, "the attention configuration: a row of attention_table()"},
      {"vocab_size", &Config::vocab_size, 2, 1 << 20, "ids of the tokenizer"},
      {"hidden_size", &Config::hidden_size, 1, 65536, "width of the residual stream"},
      {"layers", &Config::layers, 1, 1000, "transformer blocks"},
      {"heads", &Config::heads, 1, 1024, "attention heads"},
      {"ffn_size", &Config::ffn_size, 1, 262144, "hidden width of an expert"},
      {"experts", &Config::experts, 1, 1024, "experts of a layer"},
      {"top_k", &Config::top_k, 1, 1024, "experts a token is sent to"},
      {"max_seq_len", &Config::max_seq_len, 1, 1 << 20, "longest text"},
      {"dropout", &Config::dropout, 0, 0.99, "probability that an activation is dropped in training"},
      {"router_noise", &Config::router_noise, 0, 100, "standard deviation of the noise on router logits in training"},
      {"balance_weight", &Config::balance_weight, 0, 100, "weight of the load-balance loss"},
      {"init_std", &Config::init_std, 0, 10, "standard deviation of initial weights"},
      {"rms_norm_eps", &Config::rms_norm_eps, 0, 1, "added to the mean square in RMSNorm"},
      {"q_lora_rank", &Config::q_lora_rank, 0, 65536, "rank of the query projection; 0: a plain one", true},
      {"kv_lora_rank", &Config::kv_lora_rank, 0, 65536, "width of the latent that keys and values come from", true},
      {"qk_rope_head_dim", &Config::qk_rope_head_dim, 0, 4096, "rotary part of a query and of the shared key", true},
      {"qk_nope_head_dim", &Config::qk_nope_head_dim, 0, 4096, "part of a query and a key without position", true},
      {"v_head_dim", &Config::v_head_dim, 0, 4096, "value size of a head", true},
      {"attention_bias", &Config::attention_bias, 0, 0, "bias on q_a, kv_a and the output projection", true},
      {"rope_base", &Config::rope_base, 1, 1e12, "base of the rotary angles"},
      {"rope_scaling", &Config::rope_scaling, 0, 0, "none, linear, dynamic or yarn"},
      {"rope_factor", &Config::rope_factor, 1, 1e6, "how much longer than the original texts are"},
      {"rope_original_length", &Config::rope_original_length, 0, 1 << 20, "original text length (dynamic, yarn)"},
      {"rope_beta_fast", &Config::rope_beta_fast, 0, 1e6, "yarn: turns above which a pair is kept"},
      {"rope_beta_slow", &Config::rope_beta_slow, 0, 1e6, "yarn: turns below which a pair is stretched"},
      {"rope_mscale", &Config::rope_mscale, 0, 100, "yarn: temperature of the rotary part; 0: not given"},
      {"rope_mscale_all_dim", &Config::rope_mscale_all_dim, 0, 100, "yarn: temperature of all; 0: not given"},
  };
  return fields;
}

bool is_config_field(std::string_view name) { return find_field(name) != nullptr; }

void set_field(Config& config, const std::string& name, const std::string& text) {
  const ConfigField& f = field(name);
  struct Write {
    Config& c;
    const ConfigField& f;
    const std::string& text;
    void operator()(int64_t Config::* m) const {
      c.*m = parse_integer(f.name, text, static_cast<int64_t>(f.min), static_cast<int64_t>(f.max));
    }
    void operator()(double Config::* m) const { c.*m = parse_number(f.name, text, f.min, f.max); }
    void operator()(bool Config::* m) const { c.*m = parse_bool(f.name, text); }
    void operator()(std::string Config::* m) const { c.*m = text; }
  };
  std::visit(Write{config, f, text}, f.member);
  if (f.name == "attention") attention_row(text);
  if (f.name == "rope_scaling" && !known_scaling(text))
    fail(Fault::config, "rope_scaling must be none, linear, dynamic or yarn, found '{}'", text);
}

std::string get_field(const Config& config, const std::string& name) {
  return std::visit([&](auto member) { return fmt::format("{}", config.*member); }, field(name).member);
}

std::string to_json(const Config& config) {
  std::string json = "{\n";
  for (const ConfigField& f : config_fields()) {
    const bool text = std::holds_alternative<std::string Config::*>(f.member);
    const std::string value = get_field(config, f.name);
    json += fmt::format("  \"{}\": {}{}\n", f.name, text ? "\"" + value + "\"" : value,
                        &f == &config_fields().back() ? "" : ",");
  }
  return json + "}";
}

std::vector<std::string> violations(const Config& c) {
  std::vector<std::string> found;
  const auto must = [&](bool holds, std::string what) {
    if (!holds) found.push_back(std::move(what));
  };
  for (const ConfigField& f : config_fields())
    std::visit(
        [&](auto member) {
          const auto& value = c.*member;
          if constexpr (std::is_same_v<std::decay_t<decltype(value)>, int64_t> ||
                        std::is_same_v<std::decay_t<decltype(value)>, double>)
            must(value >= f.min && value <= f.max,  // also false for nan
                 fmt::format("{} must be from {} to {}, found {}", f.name, f.min, f.max, value));
        },
        f.member);
  must(c.top_k <= c.experts, fmt::format("top_k must be at most experts ({}), found {}", c.experts, c.top_k));

  bool latent = false;
  try {
    latent = attention_row(c.attention).latent;
  } catch (const Error& e) {
    found.push_back(e.what());
  }
  const bool divides = c.heads > 0 && c.hidden_size % c.heads == 0;
  must(divides, fmt::format("hidden_size must be a multiple of heads ({}), found {}", c.heads, c.hidden_size));
  if (latent) {
    must(c.kv_lora_rank > 0, fmt::format("{} attention needs kv_lora_rank of at least 1, found 0", c.attention));
    must(c.v_head_dim > 0, fmt::format("{} attention needs v_head_dim of at least 1, found 0", c.attention));
    must(c.qk_rope_head_dim >= 2 && c.qk_rope_head_dim % 2 == 0,
         fmt::format("qk_rope_head_dim must be even and at least 2, found {}", c.qk_rope_head_dim));
  } else if (divides) {
    must(c.head_dim() % 2 == 0,
         fmt::format("hidden_size / heads must be even for rotary embedding, found {}", c.head_dim()));
  }

  must(known_scaling(c.rope_scaling),
       fmt::format("rope_scaling must be none, linear, dynamic or yarn, found '{}'", c.rope_scaling));
  if (c.rope_scaling == "dynamic" || c.rope_scaling == "yarn")
    must(c.rope_original_length > 0,
         fmt::format("rope_scaling {} needs rope_original_length of at least 1, found 0", c.rope_scaling));
  if (c.rope_scaling == "dynamic")
    must((latent ? c.qk_rope_head_dim : divides ? c.head_dim() : 4) > 2,
         "rope_scaling dynamic needs a rotary size above 2");
  if (c.rope_scaling == "yarn") {
    must(c.rope_beta_slow > 0 && c.rope_beta_fast > c.rope_beta_slow,
         fmt::format("rope_beta_fast must be above rope_beta_slow, which must be above 0, found {} and {}",
                     c.rope_beta_fast, c.rope_beta_slow));
    must(c.rope_base > 1, "rope_scaling yarn needs a rope_base above 1");
  }
  return found;
}

void validate(const Config& config) {
  const std::vector<std::string> found = violations(config);
  if (found.empty()) return;
  std::string all;
  for (const std::string& line : found) all += "\n  " + line;
  fail(Fault::config, "the configuration does not hold together:{}", all);
}

int64_t parse_integer(std::string_view name, std::string_view text, int64_t min, int64_t max) {
  return parse<int64_t>(name, text, "a whole number", static_cast<double>(min), static_cast<double>(max));
}

double parse_number(std::string_view name, std::string_view text, double min, double max) {
  return parse<double>(name, text, "a finite number", min, max);
}

bool parse_bool(std::string_view name, std::string_view text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  fail(Fault::config, "{}: '{}' is neither true nor false", name, text);
}

std::string nearest_name(std::string_view name, const std::vector<std::string>& names) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, name.size() / 2);
  for (const std::string& other : names) {
    std::vector<size_t> row(other.size() + 1);
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 0; i < name.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i + 1;
      for (size_t j = 0; j < other.size(); ++j) {
        const size_t above = row[j + 1];
        row[j + 1] = std::min({above + 1, row[j] + 1, diagonal + (name[i] != other[j])});
        diagonal = above;
      }
    }
    if (row.back() < best_distance) best = other, best_distance = row.back();
  }
  return best;
}

}  // namespace weft
