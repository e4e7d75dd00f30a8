// train_tokenizer: a byte-level BPE of one's own from text, as a tokenizer.json that tokenize and Hugging Face's
// library read.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>

#include "data/bpe_trainer.h"
#include "data/text_input.h"
#include "data/tokenizer_file.h"
#include "engine/check.h"

namespace weft {
namespace {

void write_file(const std::string& path, const std::string& text) {
  const std::string unfinished = path + ".unfinished." + std::to_string(::getpid());
  std::ofstream out(unfinished, std::ios::binary);
  out << text;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(unfinished, path, error);
  if (!out || error) {
    std::filesystem::remove(unfinished, error);
    fail(Fault::io, "--out {}: cannot be written", path);
  }
}

int run(int argc, char** argv) {
  CLI::App app("Trains a byte-level BPE tokenizer. The same text gives the same file.");
  app.footer("Example: train_tokenizer --vocab-size 8192 --special '<|endoftext|>' --out tokenizer.json books/");
  int64_t vocab_size = 0;
  std::vector<std::string> special, inputs;
  std::string out, digits = "each", invalid_utf8 = "stop", bad_line = "stop";
  TextOptions text;
  app.add_option("--vocab-size", vocab_size, "tokens in all: special ones, 256 bytes, merges")->required();
  app.add_option(
         "--special", special,
         "a special token; may be repeated. The first one has id 0, where train_exp1 expects the document token")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option("--out", out, "tokenizer.json to write")->required();
  app.add_option("INPUT", inputs, "text files, folders, JSONL files; plain, .gz or .zst")->required();
  app.add_option("--digits", digits, "each digit a token (SmolLM), or words of digits (GPT-2)")
      ->check(CLI::IsMember({"each", "words"}))
      ->capture_default_str();
  app.add_option("--field", text.field, "the field of a JSONL line that holds the text")->capture_default_str();
  app.add_option("--documents", text.documents, "use only the first documents; 0: all")->check(CLI::NonNegativeNumber);
  app.add_option("--invalid-utf8", invalid_utf8, "stop, or replace by U+FFFD")
      ->check(CLI::IsMember({"stop", "replace"}));
  app.add_option("--on-bad-line", bad_line, "of JSONL: stop or skip")->check(CLI::IsMember({"stop", "skip"}));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(Fault::usage);
  }
  for (size_t i = 0; i < special.size(); ++i) {
    if (special[i].size() < 2) fail(Fault::usage, "--special '{}': expected at least two bytes", special[i]);
    if (std::find(special.begin(), special.begin() + static_cast<int64_t>(i), special[i]) !=
        special.begin() + static_cast<int64_t>(i))
      fail(Fault::usage, "--special '{}' is given twice", special[i]);
  }
  std::error_code error;
  if (std::filesystem::exists(out, error) && !std::filesystem::is_regular_file(out, error))
    fail(Fault::io, "--out {}: a folder or device is there, expected a file or nothing", out);
  text.invalid_utf8 = invalid_utf8 == "replace" ? InvalidUtf8::replace : InvalidUtf8::stop;
  text.bad_line = bad_line == "skip" ? BadLine::skip : BadLine::stop;
  PreTokenizer pre_tokenizer;
  pre_tokenizer.digits = digits == "each" ? PreTokenizer::Digits::each_alone : PreTokenizer::Digits::together;
  BpeTrainer trainer(pre_tokenizer);
  TextInput input(inputs, text);
  const bool terminal = ::isatty(2);
  input.read([&](TextPart part) {
    trainer.add(part.text);
    if (terminal)
      fmt::print(stderr, "\r{:.1f} of {:.1f} MB read ", input.bytes_read() / 1e6, input.total_bytes() / 1e6);
    return true;
  });
  const TokenizerContent content = trainer.train(vocab_size, special, [&](int64_t tokens) {
    if (terminal) fmt::print(stderr, "\r{} of {} tokens      ", tokens, vocab_size);
  });
  if (terminal) fmt::print(stderr, "\r{:40}\r", "");
  write_file(out, tokenizer_json(content));
  for (const std::string& warning : input.warnings()) fmt::print(stderr, "train_tokenizer: warning: {}\n", warning);
  if (static_cast<int64_t>(content.tokens.size()) < vocab_size) {
    fmt::print(stderr, "train_tokenizer: warning: {} tokens, not {}: no pair of tokens stands twice any more\n",
               content.tokens.size(), vocab_size);
  }
  fmt::print(stderr, "{} tokens from {} distinct words: {}\n", content.tokens.size(), trainer.distinct_words(), out);
  return 0;
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) {
  return weft::run_program("train_tokenizer", [&] { return weft::run(argc, argv); });
}
