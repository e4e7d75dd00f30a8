// Hugging Face's tokenizer.json, byte-level BPE only. Used by Tokenizer and train_tokenizer.
#pragma once
#include <string>

#include "data/tokenizer.h"

namespace weft {

// `name` stands for the file in messages. Whatever weft would not treat exactly as Hugging Face does is Fault::data.
TokenizerContent parse_tokenizer(const std::string& json, const std::string& name);

// The same file for a content; parse_tokenizer gives the content back.
std::string tokenizer_json(const TokenizerContent& content);

// A JSON string literal, quotes included.
std::string json_string(std::string_view text);

// A token's bytes as the characters that stand for them in the file.
std::string to_byte_alphabet(std::string_view bytes);

}  // namespace weft
