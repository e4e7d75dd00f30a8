// tokenize, detokenize and train_tokenizer as their users meet them: the document rule, splits, limits, compressed
// input, bad input, and what train_exp1 says to files that do not fit.
#include <doctest/doctest.h>
#include <zlib.h>
#include <zstd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/corpus.h"
#include "data/text_input.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "engine/check.h"
#include "tests/scratch.h"

namespace {
namespace fs = std::filesystem;
using namespace std::string_literals;
using Json = nlohmann::json;

Answer run(const std::string& command) {
  return run_command(command.starts_with("printf") || command.starts_with("cat") ? command
                                                                                 : WEFT_BINARY_DIR "/" + command);
}

const std::string kTokenizer = WEFT_SOURCE_DIR "/tests/reference/tokenizer_small.json";

Answer tokenize(const std::string& arguments) {
  return run("tokenize --tokenizer " + kTokenizer + " " + arguments + " 2>&1");
}

void write(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE_MESSAGE(in.good(), path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::vector<int32_t> tokens_of(const std::string& path) {
  const weft::TokenFile file(path);
  std::vector<int32_t> ids(static_cast<size_t>(file.size()));
  file.copy(0, file.size(), ids.data());
  return ids;
}

// The documents in a token file, as text.
std::vector<std::string> documents_of(const std::string& path) {
  const weft::Tokenizer tokenizer = weft::Tokenizer::open(kTokenizer);
  std::vector<std::string> documents;
  for (const int32_t id : tokens_of(path)) {
    if (id == 0) {
      documents.emplace_back();
    } else {
      REQUIRE(!documents.empty());
      documents.back() += tokenizer.text_of(id);
    }
  }
  return documents;
}

Json manifest_of(const std::string& folder) { return Json::parse(read(folder + "/manifest.json")); }

std::string gzipped(const std::string& text) {
  const Scratch scratch;
  const std::string path = scratch / "text.gz";
  gzFile file = gzopen(path.c_str(), "wb");
  gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
  gzclose(file);
  return read(path);
}

std::string zstded(const std::string& text) {
  std::string bytes(ZSTD_compressBound(text.size()), 0);
  bytes.resize(ZSTD_compress(bytes.data(), bytes.size(), text.data(), text.size(), 3));
  return bytes;
}

std::string some_text(int words) {
  std::string text;
  for (int64_t i = 0; i < words; ++i) text += "word" + std::to_string(i * 7919 % 1000) + (i % 11 == 10 ? ".\n\n" : " ");
  return text;
}

}  // namespace

TEST_CASE("documents are cut at blank lines by the rule of the README") {
  const Scratch scratch;
  // 3 + 3 is not above 6; the empty paragraphs count; a paragraph longer than the limit stands alone; é is one
  // character.
  write(scratch / "a.txt", "abc\n\ndéf\n\ng\n\n\n\nhijklmnop\n\n\n\nq\n");
  REQUIRE(tokenize("--document-chars 6 --out " + (scratch / "out") + " " + (scratch / "a.txt")).code == 0);
  CHECK(documents_of(scratch / "out/train_000000.bin") ==
        std::vector<std::string>{"abc\n\ndéf", "g\n\n", "hijklmnop", "q\n"});
}

TEST_CASE("a long text cut into parts for the threads gives the ids of the whole, whatever their number") {
  const Scratch scratch;
  const std::string text = some_text(600'000);  // 5 MB, one document
  write(scratch / "a.txt", text);
  REQUIRE(tokenize("-j 1 --out " + (scratch / "one") + " " + (scratch / "a.txt")).code == 0);
  REQUIRE(tokenize("-j 5 --shard-tokens 700000 --out " + (scratch / "five") + " " + (scratch / "a.txt")).code == 0);
  std::vector<int32_t> whole = {0};
  weft::Encoder(weft::Tokenizer::open(kTokenizer), weft::SpecialText::plain).encode(text, whole);
  CHECK(tokens_of(scratch / "one/train_000000.bin") == whole);
  std::vector<int32_t> parts;
  const Json five = manifest_of(scratch / "five");
  for (const Json& shard : five["shards"]) {
    const std::vector<int32_t> ids = tokens_of(scratch / ("five/" + shard["file"].get<std::string>()));
    CHECK(shard["tokens"] == ids.size());
    CHECK(ids.size() <= 700'000);
    parts.insert(parts.end(), ids.begin(), ids.end());
  }
  CHECK(parts == whole);
}

TEST_CASE("plain, .gz and .zst, text and JSONL, files and folders give the same tokens") {
  const Scratch scratch;
  const std::string text = some_text(5000);
  const std::string line = Json{{"id", 1}, {"text", text}}.dump() + "\r\n\n";
  fs::create_directories(scratch / "folder/deep");
  const std::vector<std::pair<std::string, std::string>> files = {
      {"1.txt", text},
      {"2.txt.gz", gzipped(text.substr(0, 9000)) + gzipped(text.substr(9000))},
      {"3.txt.zst", zstded(text)},
      {"4.jsonl", line},
      {"5.ndjson.gz", gzipped(line)},
      {"deep/6.jsonl.zst", zstded(line)},
      {"7.txt", "\xEF\xBB\xBF" + text}};
  for (const auto& [name, bytes] : files) write(scratch / ("folder/" + name), bytes);
  write(scratch / "folder/picture.png", "\x89PNG");
  const Answer answer = tokenize("--out " + (scratch / "out") + " " + (scratch / "folder"));
  REQUIRE_MESSAGE(answer.code == 0, answer.text);
  CHECK_MESSAGE(answer.text.find("1 files that are no text") != std::string::npos, answer.text);
  const std::vector<std::string> documents = documents_of(scratch / "out/train_000000.bin");
  REQUIRE(documents.size() == files.size());
  for (const std::string& document : documents) CHECK(document == text);
  const Json manifest = manifest_of(scratch / "out");
  CHECK(manifest["sources"].size() == files.size());
  CHECK(manifest["sources"][0]["xxh3"] == weft::hash_file(scratch / "folder/1.txt"));
  CHECK(manifest["shards"][0]["xxh3"] == weft::hash_file(scratch / "out/train_000000.bin"));
  CHECK(manifest["tokenizer"]["xxh3"] == weft::hash_file(kTokenizer));
  CHECK(manifest["counts"]["documents"] == files.size());
}

TEST_CASE("limits: first characters, documents and tokens; a held-out split by whole documents") {
  const Scratch scratch;
  std::string lines;
  for (int i = 0; i < 200; ++i) lines += Json{{"body", "document " + std::to_string(i) + " ends"}}.dump() + "\n";
  write(scratch / "a.jsonl", lines);
  const std::string input = " --field body " + (scratch / "a.jsonl");
  REQUIRE(tokenize("--first-chars 10 --documents 3 --out " + (scratch / "few") + input).code == 0);
  CHECK(documents_of(scratch / "few/train_000000.bin") ==
        std::vector<std::string>{"document 0", "document 1", "document 2"});
  REQUIRE(tokenize("--max-tokens 57 --out " + (scratch / "short") + input).code == 0);
  CHECK(tokens_of(scratch / "short/train_000000.bin").size() == 57);
  CHECK(manifest_of(scratch / "short")["sources"][0]["xxh3"].is_null());  // it was not all read
  REQUIRE(tokenize("--out " + (scratch / "all") + input).code == 0);
  REQUIRE(tokenize("--val-fraction 0.2 --out " + (scratch / "split") + input).code == 0);
  std::vector<std::string> all = documents_of(scratch / "all/train_000000.bin");
  std::vector<std::string> train = documents_of(scratch / "split/train_000000.bin");
  const std::vector<std::string> held_out = documents_of(scratch / "split/val_000000.bin");
  CHECK(held_out.size() > 20);
  CHECK(held_out.size() < 60);
  train.insert(train.end(), held_out.begin(), held_out.end());
  std::sort(train.begin(), train.end());
  std::sort(all.begin(), all.end());
  CHECK(train == all);
  CHECK(manifest_of(scratch / "split")["counts"]["held_out_documents"] == held_out.size());
}

TEST_CASE("--stdin prints ids and nothing else; detokenize gives the text back; --bytes") {
  const Answer ids =
      run("printf 'Holmes<|endoftext|> 12' | " WEFT_BINARY_DIR "/tokenize --stdin --tokenizer " + kTokenizer + " 2>&1");
  std::vector<int32_t> expected;
  weft::Encoder(weft::Tokenizer::open(kTokenizer), weft::SpecialText::allow).encode("Holmes<|endoftext|> 12", expected);
  std::string lines;
  for (const int32_t id : expected) lines += std::to_string(id) + "\n";
  CHECK(ids.text == lines);
  const Scratch scratch;
  write(scratch / "a.txt", "Holmes naïve\n");
  REQUIRE(tokenize("--document-token '' --out " + (scratch / "out") + " " + (scratch / "a.txt")).code == 0);
  CHECK(run("detokenize --tokenizer " + kTokenizer + " " + (scratch / "out/train_000000.bin")).text ==
        "Holmes naïve\n");
  REQUIRE(run("tokenize --bytes --out " + (scratch / "bytes") + " " + (scratch / "a.txt") + " 2>&1").code == 0);
  const std::vector<int32_t> bytes = tokens_of(scratch / "bytes/train_000000.bin");
  REQUIRE(bytes.size() == 15);
  CHECK(bytes[0] == 256);
  CHECK(bytes[1] == 'H');
  CHECK(run("detokenize --bytes --from 1 --count 6 " + (scratch / "bytes/train_000000.bin")).text == "Holmes");
  const Answer wrong = run("detokenize --bytes " + (scratch / "out/train_000000.bin") + " 2>&1");
  CHECK(wrong.code == 4);
  CHECK_MESSAGE(wrong.text.find("257 tokens") != std::string::npos, wrong.text);
}

TEST_CASE("a large vocabulary is written as uint32") {
  const Scratch scratch;
  Json file = Json::parse(read(kTokenizer));
  file["model"]["vocab"]["zqzqzqzq"] = 70'000;
  write(scratch / "wide.json", file.dump());
  write(scratch / "a.txt", "abc");
  REQUIRE(run("tokenize --tokenizer " + (scratch / "wide.json") + " --out " + (scratch / "out") + " " +
              (scratch / "a.txt") + " 2>&1")
              .code == 0);
  CHECK(weft::TokenFile(scratch / "out/train_000000.bin").width() == weft::TokenWidth::u32);
}

TEST_CASE("train_tokenizer writes what tokenize reads, the same each time") {
  const Scratch scratch;
  write(scratch / "a.txt", some_text(3000));
  const std::string train = "train_tokenizer --vocab-size 300 --special '<|endoftext|>' --out ";
  REQUIRE(run(train + (scratch / "a.json") + " " + (scratch / "a.txt") + " 2>&1").code == 0);
  REQUIRE(run(train + (scratch / "b.json") + " " + (scratch / "a.txt") + " 2>&1").code == 0);
  CHECK(read(scratch / "a.json") == read(scratch / "b.json"));
  REQUIRE(run("tokenize --tokenizer " + (scratch / "a.json") + " --out " + (scratch / "out") + " " +
              (scratch / "a.txt") + " 2>&1")
              .code == 0);
  CHECK(run("detokenize --tokenizer " + (scratch / "a.json") + " " + (scratch / "out/train_000000.bin")).text ==
        "<|endoftext|>" + some_text(3000));
  CHECK(run(train + (scratch / "c.json") + " --vocab-size 10 " + (scratch / "a.txt") + " 2>&1").code == 2);
  const auto on_a_folder = run(train + (scratch / "out") + " " + (scratch / "a.txt") + " 2>&1");
  CHECK(on_a_folder.code == 5);
  CHECK_MESSAGE(on_a_folder.text.find("expected a file or nothing") != std::string::npos, on_a_folder.text);
}

TEST_CASE("bad input: the file, the place and what was expected, and no output folder") {
  const Scratch scratch;
  const std::string good = "{\"text\": \"fine\"}\n";
  const std::vector<std::pair<std::string, std::string>> files = {
      {"json.jsonl", good + good + "{text: 1}\n"},
      {"torn.jsonl", good + "{\"text\": \"torn"},
      {"missing.jsonl", good + "{\"body\": \"x\"}\n"},
      {"null.jsonl", "{\"text\": null}\n"},
      {"number.jsonl", "\n\n{\"text\": 12}\n"},
      {"array.jsonl", "{\"text\": []}\n"},
      {"list.jsonl", "[1]\n"},
      {"utf8.jsonl", good + "{\"text\": \"\xff\"}\n"},
      {"half.jsonl", good + "{\"text\": \"\\ud800\"}\n"},
      {"long.jsonl", good + "{\"text\": \"" + std::string(5000, 'x') + "\"}\n"},
      {"empty.txt", ""},
      {"blank.jsonl", "\n \n\r\n"},
      {"utf16.txt",
       "\xff\xfe"
       "a\0b\0"s},
      {"gzip.jsonl", gzipped(good)},
      {"zstd.txt", zstded("abc")},
      {"utf8.txt", "ab\n\xc3("},
      {"cut.txt.gz", gzipped(some_text(2000)).substr(0, 500)},
      {"cut.txt.zst", zstded(some_text(2000)).substr(0, 500)},
      {"not.txt.gz", "plain text"},
      {"special.txt", "a <|endoftext|> b"}};
  for (const auto& [name, bytes] : files) write(scratch / name, bytes);
  write(scratch / "unigram.json",
        R"({"version": "1.0", "pre_tokenizer": {"type": "ByteLevel"}, "model": {"type": "Unigram"}})");
  fs::create_directories(scratch / "no_text");
  struct Case {
    std::string arguments;
    int code;
    std::vector<std::string> says;
  };
  const std::string out = scratch / "out", o = "--out " + out + " ";
  const std::vector<Case> cases = {
      {o + (scratch / "json.jsonl"), 4, {"json.jsonl:3", "is not JSON"}},
      {o + (scratch / "torn.jsonl"), 4, {"torn.jsonl:2", "last line"}},
      {o + (scratch / "missing.jsonl"), 4, {"missing.jsonl:2", "no field \"text\""}},
      {o + (scratch / "null.jsonl"), 4, {"null.jsonl:1", "field \"text\" is null"}},
      {o + (scratch / "number.jsonl"), 4, {"number.jsonl:3", "field \"text\" is a number"}},
      {o + (scratch / "array.jsonl"), 4, {"array.jsonl:1", "field \"text\" is an array"}},
      {o + (scratch / "list.jsonl"), 4, {"list.jsonl:1", "an array, expected an object"}},
      {o + (scratch / "utf8.jsonl"), 4, {"utf8.jsonl:2", "byte 10", "0xff"}},
      {o + (scratch / "half.jsonl"), 4, {"half.jsonl:2", "ud800"}},
      {o + "--max-line 1000 " + (scratch / "long.jsonl"), 4, {"long.jsonl:2", "1000 bytes"}},
      {o + (scratch / "empty.txt"), 4, {"empty.txt", "no documents"}},
      {o + (scratch / "blank.jsonl"), 4, {"blank.jsonl", "no documents"}},
      {o + (scratch / "utf16.txt"), 4, {"utf16.txt", "UTF-16", "iconv"}},
      {o + (scratch / "gzip.jsonl"), 4, {"gzip.jsonl", "gzip"}},
      {o + (scratch / "zstd.txt"), 4, {"zstd.txt", "zstd"}},
      {o + (scratch / "utf8.txt"), 4, {"utf8.txt@3", "0xc3"}},
      {o + (scratch / "cut.txt.gz"), 4, {"cut.txt.gz", "truncated"}},
      {o + (scratch / "cut.txt.zst"), 4, {"cut.txt.zst", "truncated"}},
      {o + (scratch / "not.txt.gz"), 4, {"not.txt.gz", "gzip"}},
      {o + "--special-in-text error " + (scratch / "special.txt"), 4, {"special.txt", "<|endoftext|>"}},
      {o + (scratch / "no_such.txt"), 5, {"no_such.txt", "no such file"}},
      {o + (scratch / "no_text"), 4, {"no_text", "no documents"}},
      {o + "--document-token '<|none|>' " + (scratch / "special.txt"), 2, {"<|none|>"}},
      {o + "--val-fraction 0.5 " + (scratch / "special.txt"), 4, {"--val-fraction"}},
      {o + "--shard-tokens 0 " + (scratch / "special.txt"), 2, {"--shard-tokens"}},
      {(scratch / "special.txt"), 2, {"--out"}},
      {"--out /proc/nowhere " + (scratch / "special.txt"), 5, {"/proc/nowhere"}},
      {"--out " + scratch.path.string() + " " + (scratch / "special.txt"), 2, {"not an empty folder"}},
      {"--stdin < " + (scratch / "utf8.txt"), 4, {"standard input@3"}},
  };
  for (const Case& c : cases) {
    const Answer answer = tokenize(c.arguments);
    CHECK_MESSAGE(answer.code == c.code, c.arguments << " answered " << answer.code << ": " << answer.text);
    for (const std::string& part : c.says)
      CHECK_MESSAGE(answer.text.find(part) != std::string::npos, c.arguments << ": " << answer.text);
    CHECK_MESSAGE(!fs::exists(out), c.arguments);
  }
  for (const auto& entry : fs::directory_iterator(scratch.path))
    CHECK(entry.path().string().find("unfinished") == std::string::npos);
  const Answer unigram = run("tokenize --tokenizer " + (scratch / "unigram.json") + " --stdin < /dev/null 2>&1");
  CHECK(unigram.code == 4);
  CHECK_MESSAGE(unigram.text.find("unigram.json: unsupported $.model.type = Unigram") != std::string::npos,
                unigram.text);
}

TEST_CASE("what may be passed over on request: bad lines, invalid UTF-8") {
  const Scratch scratch;
  write(scratch / "a.jsonl", "{\"text\": \"one\"}\nnonsense\n{\"text\": 3}\n{\"text\": \"two\"}\n{\"te");
  const Answer skipped = tokenize("--on-bad-line skip --out " + (scratch / "a") + " " + (scratch / "a.jsonl"));
  CHECK_MESSAGE(skipped.text.find("3 bad lines skipped") != std::string::npos, skipped.text);
  CHECK(documents_of(scratch / "a/train_000000.bin") == std::vector<std::string>{"one", "two"});
  CHECK(manifest_of(scratch / "a")["counts"]["bad_lines"] == 3);
  write(scratch / "b.jsonl", "{\"text\": \"x\xff\\ud800y \\ud83d\\ude00 \\\\ud800\"}\n");
  REQUIRE(tokenize("--invalid-utf8 replace --out " + (scratch / "b") + " " + (scratch / "b.jsonl")).code == 0);
  CHECK(documents_of(scratch / "b/train_000000.bin") == std::vector<std::string>{"x\uFFFD\uFFFDy 😀 \\ud800"});
  write(scratch / "special.txt", "a <|endoftext|> b");
  REQUIRE(tokenize("--out " + (scratch / "plain") + " " + (scratch / "special.txt")).code == 0);
  CHECK(manifest_of(scratch / "plain")["counts"]["special_in_text"] == 1);
  CHECK(documents_of(scratch / "plain/train_000000.bin") == std::vector<std::string>{"a <|endoftext|> b"});
  REQUIRE(tokenize("--special-in-text allow --out " + (scratch / "allow") + " " + (scratch / "special.txt")).code == 0);
  CHECK(documents_of(scratch / "allow/train_000000.bin") == std::vector<std::string>{"a ", " b"});
}

TEST_CASE("a corpus refuses files that do not agree with their manifest, and reads a folder's training files") {
  const Scratch scratch;
  write(scratch / "a.txt", some_text(3000));
  REQUIRE(tokenize("--document-chars 500 --val-fraction 0.3 --shard-tokens 2000 --out " + (scratch / "out") + " " +
                   (scratch / "a.txt"))
              .code == 0);
  const auto error_of = [](const std::vector<std::string>& paths, int64_t vocab_size) -> std::string {
    try {
      weft::Corpus::open(paths, vocab_size);
    } catch (const weft::Error& e) {
      CHECK(e.fault() == weft::Fault::data);
      return e.what();
    }
    return "accepted";
  };
  const std::string shard = scratch / "out/train_000000.bin";
  int64_t tokens = 0;
  const Json made = manifest_of(scratch / "out");
  for (const Json& s : made["shards"]) tokens += s["split"] == "train" ? s["tokens"].get<int64_t>() : 0;
  CHECK(weft::Corpus::open({scratch / "out"}, 1500).size() == tokens);
  const std::string small = error_of({shard}, 1499);
  CHECK_MESSAGE((small.find("1500") != std::string::npos && small.find("1499") != std::string::npos), small);
  CHECK(run("train_exp1 --preset tiny --device cpu --dry-run --data " + (scratch / "out") + " 2>&1").code == 4);
  REQUIRE(tokenize("--out " + (scratch / "again") + " " + (scratch / "a.txt")).code == 0);
  Json manifest = manifest_of(scratch / "again");
  manifest["tokenizer"]["xxh3"] = "0123456789abcdef";
  write(scratch / "again/manifest.json", manifest.dump());
  CHECK(error_of({shard, scratch / "again/train_000000.bin"}, 1500).find("0123456789abcdef") != std::string::npos);
  std::string bytes = read(shard);
  bytes[1030] = static_cast<char>(bytes[1030] ^ 1);
  write(shard, bytes);
  CHECK(error_of({shard}, 1500).find("checksum") != std::string::npos);
  weft::write_token_file(shard, std::vector<int32_t>(10, 1), weft::TokenWidth::u16);
  CHECK(error_of({shard}, 1500).find("1044 bytes") != std::string::npos);
  write(scratch / "out/manifest.json", "{\"schema\": \"weft-tok");
  CHECK(error_of({shard}, 1500).find("manifest.json: is not JSON") != std::string::npos);
  // The document token of the manifest takes the place of id 0.
  REQUIRE(
      run("tokenize --bytes --document-chars 500 --out " + (scratch / "bytes") + " " + (scratch / "a.txt") + " 2>&1")
          .code == 0);
  const Json counts = manifest_of(scratch / "bytes")["counts"];
  CHECK(weft::Corpus::open({scratch / "bytes"}, 257).documents().size() == counts["documents"]);
}
