// detokenize: shows a token file as text.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "data/token_file.h"
#include "data/tokenizer.h"
#include "engine/check.h"

namespace weft {
namespace {

int run(int argc, char** argv) {
  CLI::App app("Shows a token file as text.");
  std::string tokenizer_path, path;
  int64_t from = 0, count = 0;
  bool bytes = false;
  auto* option = app.add_option("--tokenizer", tokenizer_path, "the tokenizer.json that made the file");
  app.add_flag("--bytes", bytes, "the file was made by tokenize --bytes")->excludes(option);
  app.add_option("FILE", path, "token file in llm.c's format")->required();
  app.add_option("--from", from, "first token shown")->check(CLI::NonNegativeNumber);
  app.add_option("--count", count, "tokens shown; 0: all")->check(CLI::NonNegativeNumber);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(Fault::usage);
  }
  if (!bytes && tokenizer_path.empty()) fail(Fault::usage, "one of --tokenizer and --bytes is needed");
  const Tokenizer tokenizer = bytes ? Tokenizer::bytes() : Tokenizer::open(tokenizer_path);
  const TokenFile file(path);
  if (from >= file.size()) fail(Fault::usage, "--from {}: {} has {} tokens", from, path, file.size());
  const int64_t end = count == 0 ? file.size() : from + std::min(count, file.size() - from);
  std::vector<int32_t> block(1 << 16);
  while (from < end) {
    const int64_t n = std::min<int64_t>(static_cast<int64_t>(block.size()), end - from);
    file.copy(from, n, block.data());
    std::string text;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t id = static_cast<uint32_t>(block[i]);
      if (id >= tokenizer.vocab_size()) {
        fail(Fault::data, "{}: token {} has id {}, but {} has {} tokens", path, from + i, id,
             bytes ? "--bytes" : tokenizer_path, tokenizer.vocab_size());
      }
      text += tokenizer.text_of(id);
    }
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size())
      fail(Fault::io, "standard output: cannot be written");
    from += n;
  }
  if (std::fflush(stdout) != 0) fail(Fault::io, "standard output: cannot be written");
  return 0;
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) {
  return weft::run_program("detokenize", [&] { return weft::run(argc, argv); });
}
