#include "data/tokenizer_file.h"

#include <simdjson.h>

#include <algorithm>
#include <map>
#include <unordered_map>
#include <unordered_set>

#include "data/tokenizer_unicode.h"
#include "engine/check.h"

namespace weft {
namespace {

using simdjson::dom::array;
using simdjson::dom::element;
using simdjson::dom::element_type;
using simdjson::dom::object;

constexpr int64_t kMaxVocab = 1 << 24;  // a larger id is a damaged file, and must not size a table

// The character that stands for each byte: itself where it prints, else 256, 257, ... in order.
std::array<char32_t, 256> make_alphabet() {
  std::array<char32_t, 256> alphabet;
  char32_t next = 256;
  for (char32_t b = 0; b < 256; ++b) {
    const bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    alphabet[b] = prints ? b : next++;
  }
  return alphabet;
}
const std::array<char32_t, 256> kAlphabet = make_alphabet();

// The bytes that a token's characters stand for; false if one of them stands for none.
bool from_byte_alphabet(std::string_view text, std::string& bytes) {
  static const std::array<int, 512> byte_of = [] {
    std::array<int, 512> table;
    table.fill(-1);
    for (int b = 0; b < 256; ++b) table[kAlphabet[b]] = b;
    return table;
  }();
  bytes.clear();
  const char* p = text.data();
  while (p < text.data() + text.size()) {
    const char32_t code = next_code_point(p);
    if (code >= 512 || byte_of[code] < 0) return false;
    bytes.push_back(static_cast<char>(byte_of[code]));
  }
  return true;
}

std::string shown(element value) {
  std::string text = simdjson::minify(value);
  return text.size() > 60 ? text.substr(0, 60) + "..." : text;
}

// A value with its place in the file, "$.model.vocab".
struct Node {
  element value;
  std::string path;
  const std::string* file;

  [[noreturn]] void refuse(const std::string& expected) const {
    fail(Fault::data, "{}: {} is {}, expected {}", *file, path, shown(value), expected);
  }
  Node child(std::string_view key, element v) const { return {v, path + "." + std::string(key), file}; }
  Node child(size_t i, element v) const { return {v, fmt::format("{}[{}]", path, i), file}; }

  object as_object() const {
    object o;
    if (value.get(o)) refuse("an object");
    return o;
  }
  array as_array() const {
    array a;
    if (value.get(a)) refuse("an array");
    return a;
  }
  std::string_view as_string() const {
    std::string_view s;
    if (value.get(s)) refuse("a string");
    return s;
  }
  bool as_bool() const {
    bool b;
    if (value.get(b)) refuse("true or false");
    return b;
  }
  int32_t as_id() const {
    int64_t id;
    if (value.type() != element_type::INT64 || value.get(id) || id < 0 || id >= kMaxVocab) {
      refuse(fmt::format("a token id, 0 to {}", kMaxVocab - 1));
    }
    return static_cast<int32_t>(id);
  }
};

// The fields of an object, each of which must be asked for once: what is left over is unknown.
class Fields {
 public:
  explicit Fields(const Node& node) : node_(node) {
    for (const auto field : node.as_object()) {
      if (!fields_.emplace(std::string(field.key), field.value).second) {
        fail(Fault::data, "{}: {}.{} stands there twice", *node.file, node.path, field.key);
      }
    }
  }

  bool has(const std::string& key) const { return fields_.contains(key); }
  // Fault::data if the key is missing.
  Node take(const std::string& key) {
    const auto found = fields_.find(key);
    if (found == fields_.end()) fail(Fault::data, "{}: {}.{} is missing", *node_.file, node_.path, key);
    Node node = node_.child(key, found->second);
    fields_.erase(found);
    return node;
  }
  bool take_bool(const std::string& key, bool otherwise) { return has(key) ? take(key).as_bool() : otherwise; }
  // A key that must be absent, null or (with `empty`) "".
  void take_null(const std::string& key, bool empty = false) {
    if (!has(key)) return;
    const Node node = take(key);
    if (node.value.is_null() || (empty && node.value.is_string() && node.as_string().empty())) return;
    fail(Fault::data, "{}: {} is {}: not supported, only null is", *node_.file, node.path, shown(node.value));
  }
  void finish() const {
    if (fields_.empty()) return;
    fail(Fault::data, "{}: {}.{} is not supported", *node_.file, node_.path, fields_.begin()->first);
  }

 private:
  Node node_;
  std::map<std::string, element> fields_;
};

[[noreturn]] void unsupported_type(const Node& type, const char* supported) {
  fail(Fault::data, "{}: unsupported {} = {}; supported: {}", *type.file, type.path, type.as_string(), supported);
}

PreTokenizer read_byte_level(Fields& fields, PreTokenizer pre) {
  pre.add_prefix_space = fields.take_bool("add_prefix_space", true);
  pre.use_regex = fields.take_bool("use_regex", true);
  fields.take_bool("trim_offsets", true);
  fields.finish();
  return pre;
}

PreTokenizer read_pre_tokenizer(const Node& node) {
  constexpr const char* kSupported = "ByteLevel, Sequence[Digits, ByteLevel]";
  if (node.value.is_null()) {
    fail(Fault::data, "{}: unsupported {} = null; supported: {}", *node.file, node.path, kSupported);
  }
  PreTokenizer pre;
  Fields fields(node);
  const Node type = fields.take("type");
  if (type.as_string() == "ByteLevel") return read_byte_level(fields, pre);
  if (type.as_string() != "Sequence") unsupported_type(type, kSupported);
  const Node steps = fields.take("pretokenizers");
  fields.finish();
  const array list = steps.as_array();
  for (size_t i = 0; i < list.size(); ++i) {
    const bool last = i + 1 == list.size();
    Fields step(steps.child(i, list.at(i)));
    const Node step_type = step.take("type");
    if (last && step_type.as_string() == "ByteLevel") return read_byte_level(step, pre);
    if (i > 0 || last || step_type.as_string() != "Digits") unsupported_type(step_type, kSupported);
    pre.digits =
        step.take_bool("individual_digits", false) ? PreTokenizer::Digits::each_alone : PreTokenizer::Digits::in_runs;
    step.finish();
  }
  steps.refuse(kSupported);
}

// A step that changes no ids if it is ByteLevel.
void read_byte_level_only(Fields& top, const char* key) {
  if (!top.has(key)) return;
  const Node node = top.take(key);
  if (node.value.is_null()) return;
  Fields fields(node);
  const Node type = fields.take("type");
  if (type.as_string() != "ByteLevel") unsupported_type(type, "null, ByteLevel");
}

class Reader {
 public:
  Reader(const Node& root) : root_(root) {}

  TokenizerContent read() {
    Fields top(root_);
    const Node version = top.take("version");
    if (version.as_string() != "1.0") {
      fail(Fault::data, "{}: Unknown tokenizer version '{}', expected '1.0'", *root_.file, version.as_string());
    }
    for (const char* key : {"truncation", "padding", "normalizer"}) top.take_null(key);
    content_.pre_tokenizer = read_pre_tokenizer(top.take("pre_tokenizer"));
    read_byte_level_only(top, "post_processor");
    read_byte_level_only(top, "decoder");
    read_model(top.take("model"));
    if (top.has("added_tokens")) read_added(top.take("added_tokens"));
    top.finish();
    for (size_t id = 0; id < content_.tokens.size(); ++id) content_.holes += !used_[id];
    if (content_.holes > 0) warn("{} ids below {} have no token", content_.holes, content_.tokens.size());
    return std::move(content_);
  }

 private:
  template <class... A>
  void warn(const char* format, const A&... args) {
    content_.warnings.push_back(*root_.file + ": " + fmt::format(fmt::runtime(format), args...));
  }

  void read_model(const Node& node) {
    Fields model(node);
    if (model.has("type")) {
      const Node type = model.take("type");
      if (type.as_string() != "BPE") unsupported_type(type, "BPE");
    }
    if (model.has("dropout")) {
      const Node dropout = model.take("dropout");
      double rate = 0;
      if (!dropout.value.is_null() && (dropout.value.get(rate) || !(rate >= 0 && rate <= 1))) dropout.refuse("null");
      if (rate != 0) fail(Fault::data, "{}: {} is {}: not supported, only null is", *node.file, dropout.path, rate);
    }
    model.take_null("continuing_subword_prefix", true);
    model.take_null("end_of_word_suffix", true);
    model.take_bool("fuse_unk", false);  // without effect where every byte has a token
    if (model.take_bool("byte_fallback", false)) {
      fail(Fault::data, "{}: {}.byte_fallback is true: not supported", *node.file, node.path);
    }
    content_.ignore_merges = model.take_bool("ignore_merges", false);
    std::string unknown;
    if (model.has("unk_token")) {
      const Node unk = model.take("unk_token");
      if (!unk.value.is_null()) unknown = unk.as_string();
    }
    for (const char* key : {"vocab", "merges"}) {
      if (!model.has(key)) fail(Fault::data, "{}: {}.{} is missing", *node.file, node.path, key);
    }
    read_vocab(model.take("vocab"));
    read_merges(model.take("merges"));
    model.finish();
    int64_t missing = 0;
    for (int b = 0; b < 256; ++b) {
      // C0, C1 and F5 to FF stand in no UTF-8.
      if (b != 0xC0 && b != 0xC1 && b < 0xF5)
        missing += !ids_.contains(to_byte_alphabet(std::string(1, static_cast<char>(b))));
    }
    if (missing > 0 && !unknown.empty()) {
      fail(Fault::data, "{}: {} bytes have no token, and {}.unk_token is {}: not supported", *node.file, missing,
           node.path, unknown);
    }
    if (missing > 0) warn("{} bytes have no token: they vanish from the text", missing);
  }

  void put(int32_t id, std::string text, bool in_model) {
    if (static_cast<size_t>(id) >= content_.tokens.size()) {
      content_.tokens.resize(static_cast<size_t>(id) + 1);
      content_.in_model.resize(static_cast<size_t>(id) + 1);
      used_.resize(static_cast<size_t>(id) + 1);
    }
    content_.tokens[id] = std::move(text);
    content_.in_model[id] = in_model;
    used_[id] = true;
  }

  void read_vocab(const Node& node) {
    std::string bytes;
    for (const auto field : node.as_object()) {
      const int32_t id = Node{field.value, fmt::format("{}[\"{}\"]", node.path, field.key), node.file}.as_id();
      if (!ids_.emplace(field.key, id).second) {
        fail(Fault::data, "{}: {}: token `{}` stands there twice", *node.file, node.path, field.key);
      }
      if (static_cast<size_t>(id) < used_.size() && used_[id]) {
        const auto other = std::find_if(ids_.begin(), ids_.end(),
                                        [&](const auto& e) { return e.second == id && e.first != field.key; });
        fail(Fault::data, "{}: {}: tokens `{}` and `{}` both have id {}", *node.file, node.path, other->first,
             field.key, id);
      }
      const bool in_alphabet = from_byte_alphabet(field.key, bytes);
      if (in_alphabet) {
        put(id, bytes, true);
      } else {
        put(id, std::string(field.key), false);
        foreign_.emplace(field.key);
      }
    }
    if (ids_.empty()) node.refuse("at least one token");
    model_size_ = static_cast<int32_t>(ids_.size());
  }

  int32_t id_of(std::string_view token, const Node& merge) const {
    const auto found = ids_.find(token);
    if (found != ids_.end()) return found->second;
    fail(Fault::data, "{}: token `{}` of {} is not in the vocabulary", *merge.file, token, merge.path);
  }

  void read_merges(const Node& node) {
    size_t i = 0;
    for (const element entry : node.as_array()) {
      const Node merge = node.child(i++, entry);
      std::vector<std::string_view> parts;
      if (entry.is_array()) {
        size_t part = 0;
        for (const element text : merge.as_array()) parts.push_back(merge.child(part++, text).as_string());
      } else {
        std::string_view rest = merge.as_string();
        if (rest.starts_with("#version")) continue;
        for (size_t space; (space = rest.find(' ')) != std::string_view::npos; rest.remove_prefix(space + 1)) {
          parts.push_back(rest.substr(0, space));
        }
        parts.push_back(rest);
      }
      if (parts.size() != 2) {
        fail(Fault::data, "{}: {} has {} parts, expected 2: {}", *node.file, merge.path, parts.size(), shown(entry));
      }
      const int32_t left = id_of(parts[0], merge), right = id_of(parts[1], merge);
      content_.merges.push_back({left, right, id_of(std::string(parts[0]).append(parts[1]), merge)});
    }
  }

  void read_added(const Node& node) {
    size_t i = 0;
    int32_t next = model_size_;  // the id that Hugging Face's library gives to one that is not in the vocabulary
    std::unordered_set<std::string_view> seen;
    for (const element entry : node.as_array()) {
      const Node token = node.child(i++, entry);
      Fields fields(token);
      AddedToken added;
      const Node content = fields.take("content");
      added.text = content.as_string();
      if (added.text.empty()) fail(Fault::data, "{}: {} is empty", *node.file, content.path);
      if (!seen.insert(content.as_string()).second) {
        fail(Fault::data, "{}: {}: `{}` stands there twice", *node.file, content.path, added.text);
      }
      const Node id = fields.take("id");
      added.id = id.as_id();
      added.special = fields.take_bool("special", false);
      added.normalized = fields.take_bool("normalized", !added.special);
      for (const char* key : {"single_word", "lstrip", "rstrip"}) {
        if (fields.take_bool(key, false)) {
          fail(Fault::data, "{}: {}.{} is true: not supported", *node.file, token.path, key);
        }
      }
      fields.finish();
      const auto in_vocab = ids_.find(added.text);
      const int32_t expected = in_vocab != ids_.end() ? in_vocab->second : next++;
      if (added.id != expected) {
        fail(Fault::data, "{}: {} is {}, expected {}: {} `{}`", *node.file, id.path, added.id, expected,
             in_vocab != ids_.end() ? "the vocabulary's id of" : "the next free id, for", added.text);
      }
      if (in_vocab == ids_.end() && static_cast<size_t>(added.id) < used_.size() && used_[added.id]) {
        fail(Fault::data, "{}: {} is {}, which is a token of the vocabulary already", *node.file, id.path, added.id);
      }
      foreign_.erase(added.text);
      // An added token that is a vocabulary entry too can still be made by merges.
      const bool in_model = in_vocab != ids_.end() && content_.in_model[added.id];
      std::string bytes;
      if (in_model) from_byte_alphabet(added.text, bytes);
      put(added.id, bytes == added.text || !in_model ? added.text : bytes, in_model);
      content_.added.push_back(std::move(added));
    }
    if (!foreign_.empty()) {
      warn("{} tokens hold characters outside the byte alphabet, such as `{}`: no text gives them", foreign_.size(),
           *foreign_.begin());
    }
  }

  Node root_;
  TokenizerContent content_;
  std::unordered_map<std::string_view, int32_t> ids_;
  std::unordered_set<std::string_view> foreign_;
  std::vector<bool> used_;
  int32_t model_size_ = 0;
};

}  // namespace

std::string to_byte_alphabet(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) append_utf8(text, kAlphabet[static_cast<unsigned char>(c)]);
  return text;
}

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<int>(c));
    } else {
      out += c;
    }
  }
  return out + '"';
}

TokenizerContent parse_tokenizer(const std::string& json, const std::string& name) {
  simdjson::dom::parser parser;
  element root;
  if (const auto error = parser.parse(simdjson::padded_string(json)).get(root)) {
    fail(Fault::data, "{}: is not JSON: {}", name, simdjson::error_message(error));
  }
  return Reader({root, "$", &name}).read();
}

std::string tokenizer_json(const TokenizerContent& content) {
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  std::string added, vocab, merges;
  for (const AddedToken& token : content.added) {
    added += fmt::format(
        "{}\n    {{\"id\": {}, \"content\": {}, \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
        "\"normalized\": {}, \"special\": {}}}",
        added.empty() ? "" : ",", token.id, json_string(token.text), flag(token.normalized), flag(token.special));
  }
  for (size_t id = 0; id < content.tokens.size(); ++id) {
    const std::string& token = content.tokens[id];
    if (token.empty()) continue;
    const bool is_added =
        std::any_of(content.added.begin(), content.added.end(), [&](const AddedToken& t) { return t.text == token; });
    vocab += fmt::format("{}\n      {}: {}", vocab.empty() ? "" : ",",
                         json_string(is_added ? token : to_byte_alphabet(token)), id);
  }
  for (const Bpe::Merge& merge : content.merges) {
    merges += fmt::format("{}\n      [{}, {}]", merges.empty() ? "" : ",",
                          json_string(to_byte_alphabet(content.tokens[merge.left])),
                          json_string(to_byte_alphabet(content.tokens[merge.right])));
  }
  const PreTokenizer& pre = content.pre_tokenizer;
  const std::string byte_level =
      fmt::format(R"({{"type": "ByteLevel", "add_prefix_space": {}, "trim_offsets": true, "use_regex": {}}})",
                  flag(pre.add_prefix_space), flag(pre.use_regex));
  const std::string steps =
      pre.digits == PreTokenizer::Digits::together
          ? byte_level
          : fmt::format(
                R"({{"type": "Sequence", "pretokenizers": [{{"type": "Digits", "individual_digits": {}}}, {}]}})",
                flag(pre.digits == PreTokenizer::Digits::each_alone), byte_level);
  return fmt::format(R"({{
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [{}],
  "normalizer": null,
  "pre_tokenizer": {},
  "post_processor": null,
  "decoder": {{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}},
  "model": {{
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": {},
    "vocab": {{{}
    }},
    "merges": [{}
    ]
  }}
}}
)",
                     added, steps, flag(content.ignore_merges), vocab, merges);
}

}  // namespace weft
