// The shape of a model: one struct with the experiment's defaults, a table of its fields for everything that reads or
// writes them by name (--set, --print-config, resolved_config.json), and the check of the whole.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace weft {

struct Config {
  std::string attention = "baseline";  // a row of model/attention.h's table, whose values are below
  int64_t vocab_size = 49152, hidden_size = 768, layers = 10, heads = 12;
  int64_t ffn_size = 3072, experts = 8, top_k = 2;
  int64_t max_seq_len = 512;
  double dropout = 0.1, router_noise = 0.1, balance_weight = 0.01;
  double init_std = 0.02;
  double rms_norm_eps = 1.1920929e-7;

  // Latent attention only.
  int64_t q_lora_rank = 0;  // 0: a plain query projection
  int64_t kv_lora_rank = 0, qk_rope_head_dim = 0, qk_nope_head_dim = 0, v_head_dim = 0;
  bool attention_bias = false;  // on q_a, kv_a and the output

  double rope_base = 10000;
  std::string rope_scaling = "none";  // none, linear, dynamic, yarn
  double rope_factor = 1;
  int64_t rope_original_length = 0;   // dynamic, yarn
  double rope_beta_fast = 32, rope_beta_slow = 1, rope_mscale = 0, rope_mscale_all_dim = 0;  // yarn

  int64_t head_dim() const { return hidden_size / heads; }
};

struct ConfigField {
  std::string name;
  std::variant<int64_t Config::*, double Config::*, bool Config::*, std::string Config::*> member;
  double min, max;  // of a number
  std::string help;
  bool latent_only = false;
};
const std::vector<ConfigField>& config_fields();
bool is_config_field(std::string_view name);

// Writes a field from text. Throws Fault::config: an unknown name (with the nearest there is), text that is no number,
// a number out of the field's range.
void set_field(Config& config, const std::string& name, const std::string& text);
std::string get_field(const Config& config, const std::string& name);
// A JSON object of all fields, one a line.
std::string to_json(const Config& config);

// Everything that does not hold, one line each; empty when the model can be built.
std::vector<std::string> violations(const Config& config);
// Throws Fault::config with all violations.
void validate(const Config& config);

// Text to a value, for every setting and option: the whole text, finite, within [min, max]. Throws Fault::config.
int64_t parse_integer(std::string_view name, std::string_view text, int64_t min, int64_t max);
double parse_number(std::string_view name, std::string_view text, double min, double max);
bool parse_bool(std::string_view name, std::string_view text);
// The name that is nearest to `name` by edit distance, if any is near; else empty.
std::string nearest_name(std::string_view name, const std::vector<std::string>& names);

}  // namespace weft
