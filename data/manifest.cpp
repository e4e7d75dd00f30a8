#include "data/manifest.h"

#include <simdjson.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "data/tokenizer_file.h"
#include "engine/check.h"

namespace weft {
namespace {
namespace fs = std::filesystem;

constexpr const char* kSchema = "weft-tokens-1";

std::string join(const std::vector<std::string>& items) {
  std::string out;
  for (const std::string& item : items) out += (out.empty() ? "\n    " : ",\n    ") + item;
  return out;
}

std::string path_of(const std::string& folder) { return (fs::path(folder) / "manifest.json").string(); }

}  // namespace

void write_manifest(const Manifest& manifest, const std::string& folder) {
  std::vector<std::string> options, counts, sources, shards;
  for (const auto& [name, value] : manifest.options) options.push_back(fmt::format("{}: {}", json_string(name), value));
  for (const auto& [name, value] : manifest.counts) counts.push_back(fmt::format("{}: {}", json_string(name), value));
  for (const TextSource& s : manifest.sources) {
    sources.push_back(fmt::format(R"({{"path": {}, "bytes": {}, "documents": {}, "xxh3": {}}})", json_string(s.path),
                                  s.bytes, s.documents < 0 ? "null" : std::to_string(s.documents),
                                  s.hash.empty() ? "null" : json_string(s.hash)));
  }
  for (const Shard& s : manifest.shards) {
    shards.push_back(
        fmt::format(R"({{"file": {}, "split": {}, "tokens": {}, "documents": {}, "bytes": {}, "xxh3": {}}})",
                    json_string(s.file), json_string(s.split), s.tokens, s.documents, s.bytes, json_string(s.hash)));
  }
  const std::string text = fmt::format(
      R"({{
  "schema": "{}",
  "tokenizer": {{"file": {}, "xxh3": {}, "vocab_size": {}}},
  "document_token": {},
  "options": {{{}
  }},
  "counts": {{{}
  }},
  "sources": [{}
  ],
  "shards": [{}
  ]
}}
)",
      kSchema, json_string(manifest.tokenizer), json_string(manifest.tokenizer_hash), manifest.vocab_size,
      manifest.document_token_id < 0 ? "null"
                                     : fmt::format(R"({{"text": {}, "id": {}}})", json_string(manifest.document_token),
                                                   manifest.document_token_id),
      join(options), join(counts), join(sources), join(shards));
  const std::string path = path_of(folder), unfinished = path + ".unfinished." + std::to_string(::getpid());
  std::ofstream out(unfinished, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) fs::rename(unfinished, path, error);
  if (!out || error) fail(Fault::io, "{}: cannot write", path);
}

std::optional<Manifest> read_manifest(const std::string& folder) {
  const std::string path = path_of(folder);
  if (!fs::is_regular_file(path)) return {};
  simdjson::dom::parser parser;
  simdjson::dom::element root;
  if (const auto error = parser.load(path).get(root)) {
    fail(Fault::data, "{}: is not JSON: {}", path, simdjson::error_message(error));
  }
  std::string_view schema;
  if (root["schema"].get(schema) || !schema.starts_with("weft-tokens-")) return {};
  if (schema != kSchema) fail(Fault::data, "{}: schema is {}, expected {}", path, schema, kSchema);
  const auto text = [&](simdjson::dom::element from, const char* key) {
    std::string_view value;
    if (from[key].get(value)) fail(Fault::data, "{}: {} is missing or no string", path, key);
    return std::string(value);
  };
  const auto number = [&](simdjson::dom::element from, const char* key) {
    int64_t value;
    if (from[key].get(value) || value < 0) fail(Fault::data, "{}: {} is missing or no count", path, key);
    return value;
  };
  Manifest manifest;
  simdjson::dom::element tokenizer, document_token;
  simdjson::dom::array shards;
  if (root["tokenizer"].get(tokenizer)) fail(Fault::data, "{}: tokenizer is missing", path);
  manifest.tokenizer = text(tokenizer, "file");
  manifest.tokenizer_hash = text(tokenizer, "xxh3");
  manifest.vocab_size = number(tokenizer, "vocab_size");
  if (root["document_token"].get(document_token)) fail(Fault::data, "{}: document_token is missing", path);
  if (!document_token.is_null()) {
    manifest.document_token = text(document_token, "text");
    manifest.document_token_id = number(document_token, "id");
  }
  if (root["shards"].get(shards)) fail(Fault::data, "{}: shards is missing or no array", path);
  for (const auto shard : shards) {
    manifest.shards.push_back({text(shard, "file"), text(shard, "split"), number(shard, "tokens"),
                               number(shard, "documents"), number(shard, "bytes"), text(shard, "xxh3")});
  }
  return manifest;
}

std::optional<Manifest> check_token_file(const std::string& path, int64_t vocab_size) {
  const fs::path parent = fs::path(path).parent_path();
  const std::string folder = parent.empty() ? "." : parent.string();
  std::optional<Manifest> manifest = read_manifest(folder);
  if (!manifest) return {};
  const std::string name = fs::path(path).filename().string();
  const auto shard =
      std::find_if(manifest->shards.begin(), manifest->shards.end(), [&](const Shard& s) { return s.file == name; });
  if (shard == manifest->shards.end()) return {};
  if (manifest->vocab_size > vocab_size) {
    fail(Fault::data,
         "{}: made with a tokenizer of {} tokens ({}), but the model's vocab_size is {}; expected at least as many", path,
         manifest->vocab_size, manifest->tokenizer, vocab_size);
  }
  const auto bytes = static_cast<int64_t>(fs::file_size(path));
  if (bytes != shard->bytes) {
    fail(Fault::data, "{}: {} bytes, {} says {}", path, bytes, path_of(folder), shard->bytes);
  }
  const std::string hash = hash_file(path);
  if (hash != shard->hash) {
    fail(Fault::data, "{}: checksum (XXH3) {}, {} says {}: the file was changed", path, hash, path_of(folder),
         shard->hash);
  }
  return manifest;
}

std::vector<std::string> token_files_of(const std::string& path) {
  if (!fs::is_directory(path)) return {path};
  const std::optional<Manifest> manifest = read_manifest(path);
  if (!manifest) fail(Fault::io, "{}: is a directory without a manifest.json of tokenize, expected a token file", path);
  std::vector<std::string> files;
  for (const Shard& shard : manifest->shards) {
    if (shard.split == "train") files.push_back((fs::path(path) / shard.file).string());
  }
  if (files.empty()) fail(Fault::data, "{}: its manifest lists no training shards", path);
  return files;
}

}  // namespace weft
