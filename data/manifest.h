// manifest.json beside token files: what they were made of and by which tokenizer. Written by tokenize, read by Corpus,
// which refuses files that do not agree with it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "data/text_input.h"

namespace weft {

struct Shard {
  std::string file;   // name in the manifest's folder
  std::string split;  // "train" or "val"
  int64_t tokens = 0, documents = 0, bytes = 0;
  std::string hash;  // XXH3 of the file
};

struct Manifest {
  std::string tokenizer, tokenizer_hash;
  int64_t vocab_size = 0;
  std::string document_token;                                // empty: none
  int64_t document_token_id = -1;                            // -1: none
  std::vector<std::pair<std::string, std::string>> options;  // name and JSON value; not read back
  std::vector<std::pair<std::string, int64_t>> counts;       // not read back
  std::vector<TextSource> sources;                           // not read back
  std::vector<Shard> shards;
};

void write_manifest(const Manifest& manifest, const std::string& folder);

// The folder's manifest.json; none if there is none, or if it is another program's. Fault::data if it is damaged.
std::optional<Manifest> read_manifest(const std::string& folder);

// The manifest entry of a token file; none if no manifest lies beside it or it is not listed there. Fault::data if the
// file's size or checksum is not the manifest's, or its tokenizer has more tokens than `vocab_size`.
std::optional<Manifest> check_token_file(const std::string& path, int64_t vocab_size);

// A folder with a manifest stands for its training shards; another path for itself. Fault::io for any other folder.
std::vector<std::string> token_files_of(const std::string& path);

}  // namespace weft
