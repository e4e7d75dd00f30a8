// The tokenizer: the ids of Hugging Face's library (frozen in tests/reference/unicode_ids.json), the tokenizer.json
// reader's errors, the trainer.
#include "data/tokenizer.h"

#include <doctest/doctest.h>
#include <zlib.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "data/bpe_trainer.h"
#include "data/tokenizer_file.h"
#include "data/tokenizer_unicode.h"
#include "engine/check.h"

namespace {
using namespace weft;
using Json = nlohmann::ordered_json;

const std::string kReference = WEFT_SOURCE_DIR "/tests/reference/";

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE_MESSAGE(in.good(), path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::vector<int32_t> ids_of(const Tokenizer& tokenizer, std::string_view text,
                            SpecialText special = SpecialText::allow) {
  std::vector<int32_t> ids;
  Encoder(tokenizer, special).encode(text, ids);
  return ids;
}

std::string text_of(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += tokenizer.text_of(id);
  return text;
}

// 4096 code points next to each other, with "a" between, with " " between.
std::string chunk_text(char32_t first) {
  std::string text;
  for (const char* between : {"", "a", " "}) {
    bool started = false;
    for (char32_t code = first; code < first + 0x1000; ++code) {
      if (code >= 0xD800 && code <= 0xDFFF) continue;
      if (started) text += between;
      started = true;
      append_utf8(text, code);
    }
  }
  return text;
}

// A whole tokenizer file, small: all 256 bytes and a few merges.
Json small_file() {
  Json vocab;
  vocab["<s>"] = 0;
  for (int b = 0; b < 256; ++b) vocab[to_byte_alphabet(std::string(1, static_cast<char>(b)))] = 1 + b;
  vocab["ab"] = 257;
  vocab["abc"] = 258;
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens",
       {{{"id", 0},
         {"content", "<s>"},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", true}}}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model",
       {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"vocab", vocab}, {"merges", {"a b", "ab c"}}}}};
}

TokenizerContent parse(const Json& file) { return parse_tokenizer(file.dump(), "t.json"); }

void check_refused(const Json& file, std::initializer_list<const char*> parts) {
  std::string message = "accepted";
  try {
    parse(file);
  } catch (const Error& e) {
    CHECK(e.fault() == Fault::data);
    message = e.what();
  }
  CHECK_MESSAGE(message.starts_with("t.json: "), message);
  for (const char* part : parts)
    CHECK_MESSAGE(message.find(part) != std::string::npos, message << " does not say " << part);
}

Json with(const std::function<void(Json&)>& change) {
  Json file = small_file();
  change(file);
  return file;
}

}  // namespace

TEST_CASE("every code point and many awkward texts give Hugging Face's ids, in each variant of the pre-tokenizer") {
  const Json fixture = Json::parse(read_file(kReference + "unicode_ids.json"));
  const std::string file = read_file(kReference + "tokenizer_small.json");
  for (const Json& variant : fixture["variants"]) {
    TokenizerContent content = parse_tokenizer(file, "tokenizer_small.json");
    const std::string digits = variant["digits"];
    content.pre_tokenizer = {digits == "each"   ? PreTokenizer::Digits::each_alone
                             : digits == "runs" ? PreTokenizer::Digits::in_runs
                                                : PreTokenizer::Digits::together,
                             variant["add_prefix_space"], variant["use_regex"]};
    content.ignore_merges = variant["ignore_merges"];
    const Tokenizer tokenizer(std::move(content));
    Encoder encoder(tokenizer, special_text_from(variant["special_in_text"].get<std::string>()));
    std::vector<int32_t> ids;
    const std::string name = "digits " + digits + ", " + variant["special_in_text"].get<std::string>();
    for (size_t i = 0; i < variant["chunks"].size(); ++i) {
      const std::string text = chunk_text(static_cast<char32_t>(i * 0x1000));
      ids.clear();
      encoder.encode(text, ids);
      const auto crc = crc32(0, reinterpret_cast<const Bytef*>(ids.data()), static_cast<uInt>(4 * ids.size()));
      CHECK_MESSAGE(crc == variant["chunks"][i].get<uLong>(), name << ": code points from " << i * 0x1000);
      if (!variant["add_prefix_space"]) CHECK(text_of(tokenizer, ids) == text);
    }
    for (size_t i = 0; i < fixture["texts"].size(); ++i) {
      const std::string text = fixture["texts"][i];
      ids.clear();
      encoder.encode(text, ids);
      CHECK_MESSAGE(ids == variant["ids"][i].get<std::vector<int32_t>>(), name << ": " << text);
    }
  }
}

TEST_CASE("merges are read as strings and as pairs, and of a merge listed twice the later rank counts") {
  const Tokenizer strings(parse(small_file()));
  CHECK(ids_of(strings, "abc<s>") == std::vector<int32_t>{258, 0});
  const Tokenizer pairs(
      parse(with([](Json& f) { f["model"]["merges"] = Json::parse(R"([["a", "b"], ["ab", "c"]])"); })));
  CHECK(ids_of(pairs, "abc<s>") == std::vector<int32_t>{258, 0});
  const auto twice = [](Json& f) {
    f["model"]["vocab"]["bc"] = 259;
    f["model"]["merges"] = {"#version: 0.2", "a b", "b c", "a b"};
  };
  const std::vector<int32_t> ids = ids_of(Tokenizer(parse(with(twice))), "abc");
  REQUIRE(ids.size() == 2);
  CHECK(ids[1] == 259);
}

TEST_CASE("added tokens: the leftmost, then the longest; special ones as text, as tokens or refused") {
  const auto change = [](Json& f) {
    for (const char* text : {"<s>!", "<t>"}) {
      Json token = f["added_tokens"][0];
      token["id"] = f["added_tokens"].size() + 258;
      token["content"] = text;
      token["special"] = false;
      f["added_tokens"].push_back(token);
    }
  };
  const Tokenizer tokenizer(parse(with(change)));
  CHECK(tokenizer.vocab_size() == 261);
  CHECK(ids_of(tokenizer, "<s><s>!<t>") == std::vector<int32_t>{0, 259, 260});
  // Not special: a token whatever is asked for special ones.
  CHECK(ids_of(tokenizer, "<t>", SpecialText::plain) == std::vector<int32_t>{260});
  CHECK(ids_of(tokenizer, "<s>", SpecialText::plain).size() == 3);
  CHECK_THROWS_WITH_AS(ids_of(tokenizer, "x<s>", SpecialText::error), doctest::Contains("special token <s>"), Error);
  Encoder encoder(tokenizer, SpecialText::plain);
  std::vector<int32_t> ids;
  encoder.encode("<s> <s>", ids);
  CHECK(encoder.special_found() == 2);
}

TEST_CASE("T1 to T3: a tokenizer of another version or kind is refused by the name of what is not supported") {
  CHECK_THROWS_WITH_AS(parse_tokenizer("{\"version\": ", "t.json"), doctest::Contains("t.json: is not JSON"), Error);
  CHECK_THROWS_WITH_AS(parse_tokenizer("[]", "t.json"), doctest::Contains("$ is [], expected an object"), Error);
  check_refused(with([](Json& f) { f["version"] = "2.0"; }), {"Unknown tokenizer version '2.0'"});
  check_refused(with([](Json& f) { f["model"]["type"] = "Unigram"; }), {"$.model.type = Unigram", "BPE"});
  check_refused(with([](Json& f) { f["normalizer"] = {{"type", "NFC"}}; }), {"$.normalizer", "NFC", "not supported"});
  check_refused(with([](Json& f) { f["truncation"] = {{"max_length", 5}}; }), {"$.truncation"});
  check_refused(with([](Json& f) { f["pre_tokenizer"] = {{"type", "Metaspace"}}; }),
                {"$.pre_tokenizer.type = Metaspace", "ByteLevel"});
  check_refused(with([](Json& f) {
                  f["pre_tokenizer"] = {{"type", "Sequence"},
                                        {"pretokenizers", {{{"type", "Digits"}}, {{"type", "Metaspace"}}}}};
                }),
                {"$.pre_tokenizer.pretokenizers[1].type = Metaspace"});
  check_refused(with([](Json& f) { f["pre_tokenizer"] = nullptr; }), {"$.pre_tokenizer = null"});
  check_refused(with([](Json& f) { f["post_processor"] = {{"type", "TemplateProcessing"}}; }),
                {"$.post_processor.type = TemplateProcessing"});
  check_refused(with([](Json& f) { f["decoder"] = {{"type", "WordPiece"}}; }), {"$.decoder.type = WordPiece"});
  check_refused(with([](Json& f) { f["model"].erase("vocab"); }), {"$.model.vocab is missing"});
  check_refused(with([](Json& f) { f["model"].erase("merges"); }), {"$.model.merges is missing"});
  check_refused(with([](Json& f) { f["model"]["surprise"] = 1; }), {"$.model.surprise is not supported"});
  check_refused(with([](Json& f) { f["surprise"] = 1; }), {"$.surprise is not supported"});
}

TEST_CASE("T4 and T5: malformed merges and merges of unknown tokens are named by their place") {
  check_refused(with([](Json& f) { f["model"]["merges"] = {"a b", "a b c"}; }), {"$.model.merges[1] has 3 parts"});
  check_refused(with([](Json& f) { f["model"]["merges"] = {"ab"}; }), {"$.model.merges[0] has 1 parts"});
  check_refused(with([](Json& f) { f["model"]["merges"] = Json::array({Json::array({"a"})}); }),
                {"$.model.merges[0] has 1 parts"});
  check_refused(with([](Json& f) { f["model"]["merges"] = {7}; }), {"$.model.merges[0] is 7"});
  check_refused(with([](Json& f) { f["model"]["merges"] = {"a b", "a zz"}; }),
                {"`zz`", "$.model.merges[1]", "not in the vocabulary"});
  check_refused(with([](Json& f) { f["model"]["merges"] = {"b a"}; }), {"`ba`", "$.model.merges[0]"});
}

TEST_CASE("T6 to T8: ids twice, out of range, in disagreement; holes and foreign characters are warnings") {
  check_refused(with([](Json& f) { f["model"]["vocab"]["ab"] = 258; }), {"`ab`", "`abc`", "both have id 258"});
  check_refused(with([](Json& f) { f["model"]["vocab"]["ab"] = -1; }), {"$.model.vocab[\"ab\"] is -1"});
  check_refused(with([](Json& f) { f["model"]["vocab"]["ab"] = 4294967296; }), {"is 4294967296"});
  check_refused(with([](Json& f) { f["model"]["vocab"]["ab"] = 2000000000; }), {"is 2000000000"});
  check_refused(with([](Json& f) { f["model"]["vocab"]["ab"] = 1.5; }), {"is 1.5"});
  check_refused(with([](Json& f) { f["added_tokens"][0]["id"] = 5; }), {"$.added_tokens[0].id is 5, expected 0"});
  const TokenizerContent holed = parse(with([](Json& f) { f["model"]["vocab"]["abc"] = 300; }));
  CHECK(holed.tokens.size() == 301);
  CHECK(holed.holes == 42);
  REQUIRE(holed.warnings.size() == 1);
  CHECK(holed.warnings[0].find("42 ids") != std::string::npos);
  const TokenizerContent foreign = parse(with([](Json& f) { f["model"]["vocab"]["a一"] = 259; }));
  REQUIRE(foreign.warnings.size() == 1);
  CHECK(foreign.warnings[0].find("a一") != std::string::npos);
  CHECK(Tokenizer(foreign).text_of(259) == "a一");
}

TEST_CASE("T9 and T10: dropout, word endings, empty and stripping added tokens") {
  check_refused(with([](Json& f) { f["model"]["dropout"] = 0.1; }), {"$.model.dropout is 0.1", "not supported"});
  check_refused(with([](Json& f) { f["model"]["dropout"] = 1.5; }), {"$.model.dropout is 1.5"});
  check_refused(with([](Json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }),
                {"$.model.end_of_word_suffix", "</w>"});
  check_refused(with([](Json& f) { f["model"]["byte_fallback"] = true; }), {"$.model.byte_fallback"});
  check_refused(with([](Json& f) { f["added_tokens"][0]["content"] = ""; }), {"$.added_tokens[0].content is empty"});
  check_refused(with([](Json& f) { f["added_tokens"][0]["lstrip"] = true; }), {"$.added_tokens[0].lstrip"});
  parse(with([](Json& f) {
    f["model"]["continuing_subword_prefix"] = f["model"]["end_of_word_suffix"] = "";
  }));  // GPT-2's file
}

TEST_CASE("a damaged tokenizer file is an error and never a crash") {
  const std::string whole = small_file().dump();
  for (size_t n = 0; n < whole.size(); n += 7) CHECK_THROWS_AS(parse_tokenizer(whole.substr(0, n), "t.json"), Error);
  for (size_t i = 0; i < whole.size(); i += 3) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x15);
    try {
      parse_tokenizer(damaged, "t.json");
    } catch (const Error&) {
    }
  }
}

TEST_CASE("invalid UTF-8 is found and replaced as Unicode recommends") {
  struct Case {
    std::string_view text;
    size_t bad;
    std::string_view replaced;
  };
  using namespace std::string_view_literals;
  for (const Case& c :
       {Case{"ab\xff"sv, 2, "ab\uFFFD"sv}, Case{"\xc0\xaf"sv, 0, "\uFFFD\uFFFD"sv},
        Case{"\xed\xa0\x80"sv, 0, "\uFFFD\uFFFD\uFFFD"sv}, Case{"x\xf0\x9f\x91y"sv, 1, "x\uFFFDy"sv},
        Case{"\xf4\x90\x80\x80"sv, 0, "\uFFFD\uFFFD\uFFFD\uFFFD"sv}, Case{"\xe2\x82"sv, 0, "\uFFFD"sv}}) {
    CHECK(find_invalid_utf8(c.text) == c.bad);
    CHECK(replace_invalid_utf8(c.text) == c.replaced);
  }
  CHECK(find_invalid_utf8("\U0010FFFF\uD7FF\uE000\u0080") == std::string_view::npos);
}

TEST_CASE("training: the most frequent pair first, deterministic, and the file gives the same tokenizer back") {
  BpeTrainer trainer({PreTokenizer::Digits::each_alone, false, true});
  trainer.add("low low low lower lower newest newest newest newest 2024 2024");
  const TokenizerContent content = trainer.train(265, {"<s>"}, {});
  REQUIRE(content.tokens.size() == 265);
  CHECK(content.tokens[0] == "<s>");
  CHECK(content.tokens[1] == "!");
  CHECK(content.tokens[257] == "we");  // 6 times
  for (const std::string& token : content.tokens)
    CHECK_MESSAGE(token.find("20") == std::string::npos, "digits stay alone");
  const std::string json = tokenizer_json(content);
  CHECK(json == tokenizer_json(trainer.train(265, {"<s>"}, {})));
  const TokenizerContent back = parse_tokenizer(json, "t.json");
  CHECK(back.tokens == content.tokens);
  CHECK(back.merges.size() == content.merges.size());
  const std::string text = "the lowest newest <s> 20 slow\n";
  CHECK(ids_of(Tokenizer(content), text) == ids_of(Tokenizer(back), text));
  CHECK(trainer.train(5000, {}, {}).tokens.size() < 300);  // nothing stands twice any more
  CHECK_THROWS_AS(trainer.train(256, {"<s>"}, {}), Error);
}

TEST_CASE("training counts exactly: each merge is the most frequent pair of a count made anew") {
  BpeTrainer trainer({PreTokenizer::Digits::together, false, true});
  std::vector<std::string> words;
  for (int i = 0; i < 400; ++i) {
    std::string word = " ";
    for (int j = 0; j < 1 + i % 9; ++j) word += static_cast<char>('a' + (i * 7 + j * j * 3 + i / 5) % 4);
    words.push_back(word);
    trainer.add(word);
  }
  const TokenizerContent content = trainer.train(256 + 40, {}, {});
  std::vector<std::vector<int32_t>> ids;
  const Tokenizer bytes([&] {
    TokenizerContent c = content;
    c.merges.clear();
    return c;
  }());
  for (const std::string& word : words) ids.push_back(ids_of(bytes, word));
  for (const Bpe::Merge& merge : content.merges) {
    std::map<std::pair<int32_t, int32_t>, int64_t> counts;
    for (const auto& word : ids) {
      for (size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
    }
    auto best = counts.begin();
    for (auto i = counts.begin(); i != counts.end(); ++i) best = i->second > best->second ? i : best;
    CHECK(best->first == std::pair{merge.left, merge.right});
    for (auto& word : ids) {
      std::vector<int32_t> merged;
      for (size_t i = 0; i < word.size(); ++i) {
        const bool hit = i + 1 < word.size() && word[i] == merge.left && word[i + 1] == merge.right;
        merged.push_back(hit ? merge.merged : word[i]);
        i += hit;
      }
      word = merged;
    }
  }
}
