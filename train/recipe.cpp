#include "train/recipe.h"

#include <functional>
#include <limits>
#include <set>

namespace weft {
namespace {

constexpr int64_t kLargest = int64_t{1} << 40;

struct RecipeField {
  std::string name;
  std::function<void(Recipe&, const std::string& text)> set;
  std::function<Json(const Recipe&)> get;
};

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char c : text)
    if (c == ',')
      parts.emplace_back();
    else
      parts.back() += c;
  return parts;
}

RecipeField integer(std::string name, int64_t Recipe::* member, int64_t min) {
  return {name, [=](Recipe& r, const std::string& t) { r.*member = parse_integer(name, t, min, kLargest); },
          [=](const Recipe& r) -> Json { return r.*member; }};
}
RecipeField number(std::string name, double Recipe::* member, double max) {
  return {name, [=](Recipe& r, const std::string& t) { r.*member = parse_number(name, t, 0, max); },
          [=](const Recipe& r) -> Json { return r.*member; }};
}
// One of two words.
template <class T>
RecipeField choice(std::string name, T Recipe::* member, std::string first, T first_value, std::string second,
                   T second_value) {
  return {name,
          [=](Recipe& r, const std::string& t) {
            if (t != first && t != second)
              fail(Fault::config, "{} must be {} or {}, found '{}'", name, first, second, t);
            r.*member = t == first ? first_value : second_value;
          },
          [=](const Recipe& r) -> Json { return r.*member == first_value ? first : second; }};
}

const std::vector<RecipeField>& fields() {
  static const std::vector<RecipeField> table = {
      {"configs", [](Recipe& r, const std::string& t) {
         r.configs = split_list(t);
         for (const std::string& name : r.configs) attention_row(name);
       }, [](const Recipe& r) -> Json { return r.configs; }},
      {"seeds", [](Recipe& r, const std::string& t) {
         r.seeds.clear();
         for (const std::string& seed : split_list(t))
           r.seeds.push_back(static_cast<uint64_t>(parse_integer("seeds", seed, 0, std::numeric_limits<int32_t>::max())));
       }, [](const Recipe& r) -> Json { return r.seeds; }},
      {"data", [](Recipe& r, const std::string& t) {
         r.data = split_list(t);
         for (const std::string& name : r.data)
           if (name.empty())
             fail(Fault::config, "data must be names of files or folders, comma-separated, found '{}'", t);
       },
       [](const Recipe& r) -> Json { return r.data; }},
      choice("protocol", &Recipe::protocol, "seed", Protocol::seed, "strict", Protocol::strict),
      choice("precision", &Recipe::precision, "fp32", DType::f32, "bf16", DType::bf16),
      choice("optimizer", &Recipe::muon, "muon", true, "adamw", false),
      integer("steps", &Recipe::steps, 1),
      integer("batch", &Recipe::batch, 1),
      integer("seq", &Recipe::seq, 1),
      integer("accumulate", &Recipe::accumulate, 1),
      integer("eval_every", &Recipe::eval_every, 1),
      integer("eval_batches", &Recipe::eval_batches, 1),
      integer("max_tokens", &Recipe::max_tokens, -1),
      number("muon_lr", &Recipe::muon_lr, 100),
      number("momentum", &Recipe::momentum, 0.9999),
      number("adamw_lr", &Recipe::adamw_lr, 100),
      number("weight_decay", &Recipe::weight_decay, 100),
      number("clip_norm", &Recipe::clip_norm, 1e9),  // what orthogonalized() takes
      number("memory_limit_gb", &Recipe::memory_limit_gb, 1e6),
      {"graphs", [](Recipe& r, const std::string& t) { r.graphs = parse_bool("graphs", t); },
       [](const Recipe& r) -> Json { return r.graphs; }},
      choice("memory_report", &Recipe::memory_report, "on", true, "off", false),
  };
  return table;
}

// The experiment itself is what Recipe and Config start with.
void exp1(Recipe&) {}

// A model of the same form that two CPU cores train in a minute.
void quick(Recipe& r) {
  r.model.hidden_size = 96, r.model.layers = 2, r.model.heads = 4, r.model.ffn_size = 256, r.model.experts = 4;
  r.model.vocab_size = 256, r.model.max_seq_len = 128;
  r.batch = 8, r.seq = 128, r.steps = 200, r.accumulate = 1, r.eval_every = 50, r.eval_batches = 20;
  r.max_tokens = 500'000;
}

// The smallest that has every part: for checks under a sanitizer.
void tiny(Recipe& r) {
  r.model.hidden_size = 32, r.model.layers = 2, r.model.heads = 2, r.model.ffn_size = 64, r.model.experts = 4;
  r.model.vocab_size = 128, r.model.max_seq_len = 32;
  r.batch = 2, r.seq = 32, r.steps = 8, r.accumulate = 2, r.eval_every = 4, r.eval_batches = 2, r.max_tokens = 20'000;
}

struct Preset {
  const char* name;
  void (*apply)(Recipe&);
};
constexpr Preset kPresets[] = {{"exp1", exp1}, {"quick", quick}, {"tiny", tiny}};

}  // namespace

std::string preset_list() {
  std::string list;
  for (const Preset& p : kPresets) list += (list.empty() ? "" : ", ") + std::string(p.name);
  return list;
}

Recipe make_recipe(const std::string& preset, Device device) {
  for (const Preset& p : kPresets)
    if (preset == p.name) {
      Recipe recipe;
      recipe.preset = preset;
      recipe.device = device;
      if (device == Device::cuda) recipe.precision = DType::bf16;
      p.apply(recipe);
      return recipe;
    }
  fail(Fault::usage, "--preset {}: there are {}", preset, preset_list());
}

void set_field(Recipe& recipe, const std::string& key, const std::string& text) {
  std::vector<std::string> names;
  for (const RecipeField& f : fields()) {
    if (f.name == key) return f.set(recipe, text);
    names.push_back(f.name);
  }
  if (is_config_field(key) && key != "attention") {
    Config trial;
    set_field(trial, key, text);  // throws on text that does not fit the field
    recipe.overrides.emplace_back(key, text);
    return;
  }
  for (const ConfigField& f : config_fields()) names.push_back(f.name);
  const std::string near = nearest_name(key, names);
  fail(Fault::config, "unknown setting '{}'{}", key,
       key == "attention"                   ? "; --configs chooses it"
       : key == "preset" || key == "device" ? "; --" + key + " chooses it"
       : near.empty()                       ? "; train_exp1 --print-config shows those there are"
                                            : "; did you mean '" + near + "'?");
}

void validate(const Recipe& r) {
  std::string found;
  const auto must = [&](bool holds, const std::string& what) {
    if (!holds) found += "\n  " + what;
  };
  must(std::set(r.configs.begin(), r.configs.end()).size() == r.configs.size(), "configs must differ from each other");
  must(std::set(r.seeds.begin(), r.seeds.end()).size() == r.seeds.size(), "seeds must differ from each other");
  must(r.batch <= kLargest / r.seq, fmt::format("batch * seq must be at most 2^40, found {} * {}", r.batch, r.seq));
  for (const std::string& name : r.configs) {
    const Config config = r.config(name);
    for (const std::string& line : violations(config)) must(false, name + ": " + line);
    must(r.seq <= config.max_seq_len,
         fmt::format("{}: seq must be at most max_seq_len ({}), found {}", name, config.max_seq_len, r.seq));
  }
  if (!found.empty()) fail(Fault::config, "the settings do not hold together:{}", found);
}

Json resolved_config(const Recipe& recipe) {
  Json recipe_json{{"preset", recipe.preset}, {"device", name_of(recipe.device)}};
  for (const RecipeField& f : fields()) recipe_json[f.name] = f.get(recipe);
  Json models;
  for (const std::string& name : recipe.configs) models[name] = Json::parse(to_json(recipe.config(name)));
  return {{"recipe", recipe_json}, {"models", models}};
}

}  // namespace weft
