// Token files and every way they can be bad, the corpus, the two protocols, the loader, the prefetcher and the
// synthetic language.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "data/corpus.h"
#include "data/loader.h"
#include "data/token_file.h"
#include "engine/check.h"
#include "tests/scratch.h"

using namespace weft;
namespace fs = std::filesystem;

namespace {

std::string write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

std::string header(int32_t magic, int32_t version, int32_t count) {
  std::string bytes(1024, '\0');
  const int32_t fields[] = {magic, version, count};
  std::memcpy(bytes.data(), fields, sizeof fields);
  return bytes;
}

std::vector<int32_t> counting(int64_t n, int32_t first = 1) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) tokens[i] = static_cast<int32_t>(first + i);
  return tokens;
}

// Documents of the given lengths; every other token is the document's number.
std::vector<int32_t> numbered_documents(const std::vector<int64_t>& lengths) {
  std::vector<int32_t> tokens;
  for (size_t d = 0; d < lengths.size(); ++d) {
    tokens.push_back(0);
    tokens.insert(tokens.end(), static_cast<size_t>(lengths[d] - 1), static_cast<int32_t>(d + 1));
  }
  return tokens;
}

// The message of the error that `f` throws, checked to be of `fault`.
template <class F>
std::string error_of(Fault fault, F f) {
  try {
    f();
  } catch (const Error& e) {
    CHECK_MESSAGE(e.fault() == fault, e.what());
    return e.what();
  }
  FAIL_CHECK("nothing was thrown");
  return "";
}

void check_mentions(const std::string& message, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    CHECK_MESSAGE(message.find(part) != std::string::npos, "\"" << message << "\" does not mention " << part);
  }
}

std::vector<int32_t> all_of(const Corpus& corpus) {
  std::vector<int32_t> tokens(static_cast<size_t>(corpus.size()));
  corpus.copy(0, corpus.size(), tokens.data());
  return tokens;
}

// The exact reader of the synthetic language again, written for clarity: every hidden state, every id. Returns its mean
// loss; checks that each prediction sums to 1.
double dense_reader(const SyntheticOptions& o, const std::vector<int32_t>& text) {
  const int64_t words = o.vocab_size - 2, topic_words = words / o.topics;
  const double end = 1.0 / static_cast<double>(o.document_length - 32), stop = 1.0 / static_cast<double>(o.copy_length);
  const auto zipf = [](int64_t r, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += 1 / (static_cast<double>(i) + 2.7);
    return 1 / (static_cast<double>(r) + 2.7) / sum;
  };
  std::vector<std::vector<double>> word_p(static_cast<size_t>(o.topics));
  for (int64_t k = 0; k < o.topics; ++k) {
    for (int64_t w = 0; w < words; ++w) {
      const bool own = w % o.topics == k && w / o.topics < topic_words;
      word_p[k].push_back((1 - o.topic_share) * zipf(w, words) +
                          (own ? o.topic_share * zipf(w / o.topics, topic_words) : 0));
    }
  }
  using State = std::pair<int64_t, int64_t>;  // topic; next source position of a copy, or one of:
  constexpr int64_t kPlain = -1, kMarked = -2;
  std::map<State, double> belief;
  size_t start = 0;
  double loss = 0;
  for (size_t t = 0; t < text.size(); ++t) {
    if (t > 0) {
      const int64_t position = static_cast<int64_t>(t - start);
      const bool opening = position <= 32;
      std::vector<std::map<State, double>> after(static_cast<size_t>(o.vocab_size));
      for (const auto& [state, weight] : belief) {
        const auto [k, mode] = state;
        double plain = weight;
        if (mode == kMarked) {
          const int64_t first = std::max<int64_t>(1, position - 1 - o.reach), n = position - 1 - first;
          for (int64_t s = first; s < position - 1; ++s) after[text[start + s]][{k, s + 1}] += weight / n;
          continue;
        }
        if (mode >= 0) {
          after[text[start + mode]][{k, mode + 1}] += weight * (1 - stop);
          plain *= stop;
        }
        for (int64_t w = 0; w < words; ++w) {
          after[w + 2][{k, kPlain}] += plain * word_p[k][w] * (opening ? 1 : 1 - end - o.copy_rate);
        }
        if (opening) continue;
        after[0][{k, kPlain}] += plain * end;
        after[1][{k, kMarked}] += plain * o.copy_rate;
      }
      double sum = 0, p = 0;
      for (int64_t id = 0; id < o.vocab_size; ++id) {
        for (const auto& [state, weight] : after[id]) {
          sum += weight;
          if (id == text[t]) p += weight;
        }
      }
      REQUIRE(sum == doctest::Approx(1).epsilon(1e-9));
      loss -= std::log(p);
      belief.clear();
      for (const auto& [state, weight] : after[text[t]]) belief[state] = weight / p;
    }
    if (text[t] == 0) {
      start = t;
      belief.clear();
      for (int64_t k = 0; k < o.topics; ++k) belief[{k, kPlain}] = 1.0 / static_cast<double>(o.topics);
    }
  }
  return loss / static_cast<double>(text.size());
}

Batch numbered_batch(int64_t i) { return {{static_cast<int32_t>(i)}, {static_cast<int32_t>(i + 1)}, 1, 1}; }

}  // namespace

TEST_CASE("token files come back as written, in both widths") {
  const Scratch folder;
  for (const TokenWidth width : {TokenWidth::u16, TokenWidth::u32}) {
    std::vector<int32_t> tokens = counting(1000, 0);
    tokens.push_back(width == TokenWidth::u16 ? 65535 : 2147483647);
    const std::string path = folder / "tokens.bin";
    write_token_file(path, tokens, width);
    CHECK(fs::file_size(path) == 1024 + 1001 * static_cast<size_t>(width));
    const TokenFile file(path);
    CHECK(file.width() == width);
    REQUIRE(file.size() == 1001);
    std::vector<int32_t> back(1001), middle(10);
    file.copy(0, 1001, back.data());
    CHECK(back == tokens);
    file.copy(500, 10, middle.data());
    CHECK(middle == std::vector<int32_t>(tokens.begin() + 500, tokens.begin() + 510));
    error_of(Fault::internal, [&] { file.copy(995, 7, back.data()); });
    error_of(Fault::internal, [&] { file.copy(-1, 7, back.data()); });
  }
  CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
}

TEST_CASE("writing refuses ids that do not fit and leaves nothing half written") {
  const Scratch folder;
  const std::string path = folder / "tokens.bin";
  const auto write = [&](std::vector<int32_t> tokens, TokenWidth width) { write_token_file(path, tokens, width); };
  check_mentions(error_of(Fault::data,
                          [&] {
                            write({1, 65536}, TokenWidth::u16);
                          }),
                 {"tokens.bin", "token 1", "65536"});
  error_of(Fault::data, [&] { write({-1}, TokenWidth::u32); });
  error_of(Fault::data, [&] { write({}, TokenWidth::u32); });
  CHECK(fs::is_empty(folder.path));
  check_mentions(error_of(Fault::io, [&] { write_token_file(folder / "no/such.bin", counting(3), TokenWidth::u16); }),
                 {"such.bin", "No such file"});
  fs::create_directory(path);
  error_of(Fault::io, [&] { write({1, 2}, TokenWidth::u16); });
  CHECK(std::distance(fs::directory_iterator(folder.path), fs::directory_iterator()) == 1);
}

TEST_CASE("what is no token file is named for what it looks like") {
  using namespace std::string_literals;
  const Scratch folder;
  const std::pair<std::string, const char*> cases[] = {
      {"\x1f\x8b\x08 rest of the archive"s, "gzip"},
      {"PK\x03\x04 rest of the archive"s, "zip"},
      {"\x28\xb5\x2f\xfd rest"s, "zstandard"},
      {"\x08\0\0\0\0\0\0\0{\"a\":{}} "s, "safetensors"},
      {"{\"text\": \"a line of JSON\"}\n"s, "JSON"},
      {"It was the best of times, it was the worst of times"s, "plain text"},
      {"\x01\x34\xd8\x88\0\0\0\x01"s, "big-endian"},
      {"\x01\x34\xd9\xa1\0\0\0\x07"s, "big-endian"},
      {"\x93NUMPY\x01\0"s, "NumPy"},
      {std::string(2000, '\0'), "zeros"},
      {"\x12\x34\x01\x02\x03\x04\x05\x06"s, "without a header"},
      {"abc"s, "plain text"},
      {"\x01"s, "no format"},
      {header(20240522, 1, 5), "evaluation"},
  };
  for (const auto& [bytes, expected] : cases) {
    const std::string path = write_bytes(folder / "input.bin", bytes);
    check_mentions(error_of(Fault::data, [&] { TokenFile{path}; }), {"input.bin", "20240520", "looks like", expected});
  }
}

TEST_CASE("damaged token files are refused with what was expected and found") {
  const Scratch folder;
  const std::string path = folder / "input.bin";
  const auto refusal = [&](const std::string& bytes) {
    write_bytes(path, bytes);
    return error_of(Fault::data, [&] { TokenFile{path}; });
  };
  check_mentions(refusal(""), {"input.bin", "empty"});
  check_mentions(refusal(header(20240520, 1, 3).substr(0, 100)), {"truncated", "1024", "100"});
  check_mentions(refusal(header(20240520, 2, 3) + "abcdef"), {"version 2", "expected version 1"});
  check_mentions(refusal(header(20240801, 1, 3) + "abcdef"), {"version 1", "expected version 7"});
  check_mentions(refusal(header(20240520, 1, -5) + "abcdef"), {"-5 tokens"});
  check_mentions(refusal(header(20240520, 1, 0)), {"0 tokens"});
  check_mentions(refusal(header(20240520, 1, 100) + std::string(180, 'x')), {"truncated", "1224", "1204"});
  check_mentions(refusal(header(20240520, 1, 100) + std::string(220, 'x')), {"overlong", "1224", "1244"});
  check_mentions(refusal(header(20240520, 1, 100) + std::string(199, 'x')), {"truncated", "1223", "middle of a token"});
  check_mentions(refusal(header(20240801, 7, 100) + std::string(200, 'x')), {"truncated", "1424", "1224"});
  check_mentions(refusal(header(20240520, 1, 2147483647)), {"truncated", "4294968318", "1024"});

  check_mentions(error_of(Fault::io, [&] { TokenFile{folder / "absent.bin"}; }), {"absent.bin", "No such file"});
  check_mentions(error_of(Fault::io, [&] { TokenFile{folder.path.string()}; }), {"directory"});
  check_mentions(error_of(Fault::io, [&] { TokenFile{"/dev/null"}; }), {"not a regular file"});
  if (::geteuid() != 0) {
    fs::permissions(write_bytes(path, header(20240520, 1, 1) + "ab"), fs::perms::none);
    check_mentions(error_of(Fault::io, [&] { TokenFile{path}; }), {"Permission denied"});
  }
}

TEST_CASE("a file cut short while in use is an error, not a crash") {
  const Scratch folder;
  write_token_file(folder / "tokens.bin", counting(50'000), TokenWidth::u16);
  const Corpus corpus = Corpus::open({folder / "tokens.bin"}, 65536);
  fs::resize_file(folder / "tokens.bin", 2000);
  std::vector<int32_t> out(10);
  check_mentions(error_of(Fault::io, [&] { corpus.copy(40'000, 10, out.data()); }),
                 {"tokens.bin", "cut short", "101024", "2000"});
}

TEST_CASE("ids beyond the vocabulary are found before training, in the part that is used") {
  const Scratch folder;
  std::vector<int32_t> tokens = counting(70'000, 0);
  for (int32_t& id : tokens) id %= 100;
  tokens[69'998] = 100;
  write_token_file(folder / "a.bin", counting(50), TokenWidth::u16);
  write_token_file(folder / "b.bin", tokens, TokenWidth::u16);
  const std::vector<std::string> paths{folder / "a.bin", folder / "b.bin"};
  check_mentions(error_of(Fault::data, [&] { Corpus::open(paths, 100); }),
                 {"b.bin", "token 69998", "id 100", "size 100"});
  CHECK(Corpus::open(paths, 101).size() == 70'050);
  CHECK(Corpus::open(paths, 100, 70'048).size() == 70'048);
  error_of(Fault::data, [&] { Corpus::open(paths, 100, 70'049); });
  const std::string wide = header(20240801, 7, 1) + std::string("\xff\xff\xff\xff");
  const std::string path = write_bytes(folder / "wide.bin", wide);
  check_mentions(error_of(Fault::data, [&] { Corpus::open({path}, 49152); }), {"wide.bin", "id 4294967295"});
}

TEST_CASE("several files are one corpus") {
  const Scratch folder;
  write_token_file(folder / "a.bin", std::vector<int32_t>{7, 0, 1, 2}, TokenWidth::u16);
  write_token_file(folder / "b.bin", std::vector<int32_t>{3}, TokenWidth::u32);
  write_token_file(folder / "c.bin", std::vector<int32_t>{4, 5, 0, 6}, TokenWidth::u16);
  const std::vector<std::string> paths{folder / "a.bin", folder / "b.bin", folder / "c.bin"};
  const Corpus corpus = Corpus::open(paths, 10);
  const std::vector<int32_t> expected{7, 0, 1, 2, 3, 4, 5, 0, 6};
  CHECK(all_of(corpus) == expected);
  CHECK(corpus.documents() == std::vector<int64_t>{0, 1, 7});
  CHECK(std::isnan(corpus.entropy().lower));
  for (int64_t from = 0; from < 9; ++from) {
    for (int64_t n = 0; from + n <= 9; ++n) {
      std::vector<int32_t> out(static_cast<size_t>(n));
      corpus.copy(from, n, out.data());
      CHECK(std::equal(out.begin(), out.end(), expected.begin() + from));
    }
  }
  CHECK(all_of(Corpus::open(paths, 10, 5)) == std::vector<int32_t>{7, 0, 1, 2, 3});
  error_of(Fault::usage, [&] { Corpus::open({}, 10); });
  check_mentions(error_of(Fault::usage, [&] { Corpus::open({paths[0], paths[1], paths[0]}, 10); }), {"a.bin", "twice"});
  error_of(Fault::internal, [&] { corpus.copy(8, 2, std::vector<int32_t>(2).data()); });
}

TEST_CASE("a permutation hits every element once and differs by key") {
  for (const int64_t n : {1, 2, 3, 7, 16, 17, 1000, 65537}) {
    std::vector<bool> seen(static_cast<size_t>(n));
    const Permutation order({5, 1}, n), other({6, 1}, n);
    int64_t fixed = 0, same = 0;
    for (int64_t i = 0; i < n; ++i) {
      REQUIRE(order(i) >= 0);
      REQUIRE(order(i) < n);
      REQUIRE(!seen[order(i)]);
      seen[order(i)] = true;
      fixed += order(i) == i;
      same += order(i) == other(i);
    }
    if (n >= 1000) {
      CHECK(fixed < 20);
      CHECK(same < 20);
    }
  }
  error_of(Fault::internal, [] { Permutation({0, 0}, 0); });
  error_of(Fault::internal, [] { Permutation({0, 0}, 5)(5); });
}

TEST_CASE("the seed protocol: every window with stride 1, nine tenths for training, none in both") {
  const Scratch folder;
  write_token_file(folder / "a.bin", counting(1000), TokenWidth::u16);
  const Loader loader(Corpus::open({folder / "a.bin"}, 2000), Protocol::seed, 3, 16, 42);
  CHECK(loader.split().overlaps);
  CHECK(loader.split().train.count == 886);  // of 1000 - 16 = 984 windows
  CHECK(loader.split().validation.count == 98);
  CHECK(loader.train_batches() == 295);
  CHECK(loader.validation_batches() == 32);
  std::map<int32_t, int> train;
  std::set<int32_t> validation;
  for (int64_t step = 0; step < 886; ++step) {  // three epochs exactly
    const Batch batch = loader.train(step);
    for (int64_t b = 0; b < 3; ++b) ++train[batch.tokens[b * 16]];
  }
  for (int64_t i = 0; i < loader.validation_batches(); ++i) {
    const Batch batch = loader.validation(i);
    for (int64_t b = 0; b < 3; ++b) validation.insert(batch.tokens[b * 16]);
  }
  CHECK(train.size() == 886);
  for (const auto& [window, times] : train)
    CHECK_MESSAGE(times == 3, "window " << window << " came " << times << " times");
  CHECK(validation.size() == 96);
  for (const int32_t window : validation) CHECK(!train.contains(window));
  CHECK(token_limit(Protocol::seed) == 2'000'000);
}

TEST_CASE("the strict protocol: whole documents held out, windows that do not overlap") {
  const Scratch folder;
  std::vector<int64_t> lengths;
  for (int64_t d = 0; d < 300; ++d) lengths.push_back(20 + d * 37 % 90);
  const std::vector<int32_t> tokens = numbered_documents(lengths);
  write_token_file(folder / "a.bin", tokens, TokenWidth::u16);
  const Corpus corpus = Corpus::open({folder / "a.bin"}, 400);
  const Loader loader(corpus, Protocol::strict, 2, 24, 1);
  const Split& split = loader.split();
  CHECK(!split.overlaps);
  CHECK(split.held_out_documents > 10);
  CHECK(split.train.tokens() + split.validation.tokens() == corpus.size());
  CHECK(static_cast<double>(split.validation.tokens()) / corpus.size() == doctest::Approx(0.1).epsilon(0.05));
  for (const Windows* side : {&split.train, &split.validation}) {
    for (const Span& span : side->spans) {
      CHECK(tokens[span.from] == 0);
      CHECK((span.to == corpus.size() || tokens[span.to] == 0));
    }
  }
  std::map<int32_t, int64_t> read;  // tokens of each document read in one epoch
  std::set<int32_t> held;
  CHECK(loader.train_batches() * 2 + 1 >= split.train.count);
  for (int64_t step = 0; step < loader.train_batches(); ++step) {
    for (const int32_t id : loader.train(step).tokens) ++read[id];
  }
  for (int64_t i = 0; i < loader.validation_batches(); ++i) {
    const Batch batch = loader.validation(i);
    held.insert(batch.tokens.begin(), batch.tokens.end());
    held.insert(batch.targets.begin(), batch.targets.end());
  }
  for (const auto& [id, times] : read) {
    if (id == 0) continue;
    CHECK_MESSAGE(!held.contains(id), "document " << id << " is in training and in validation");
    CHECK_MESSAGE(times <= lengths[id - 1] - 1, "document " << id << " was read more than once in an epoch");
  }
  CHECK(static_cast<int64_t>(held.size()) - 1 <= split.held_out_documents);

  write_token_file(folder / "three.bin", numbered_documents({100, 90, 100}), TokenWidth::u16);
  const Split three = split_windows(Corpus::open({folder / "three.bin"}, 10), Protocol::strict, 16);
  CHECK(three.held_out_documents == 1);
  CHECK(three.validation.tokens() == 90);
}

TEST_CASE("a batch is a pure function of seed and step, and targets are the tokens that follow") {
  const Corpus corpus = Corpus::synthetic({.vocab_size = 100, .tokens = 20'000});
  const std::vector<int32_t> text = all_of(corpus);
  const Loader loader(corpus, Protocol::strict, 4, 32, 7), again(corpus, Protocol::strict, 4, 32, 7);
  const Loader other(corpus, Protocol::strict, 4, 32, 8);
  const Batch fifth = loader.train(5);
  for (int64_t step = 0; step < 300; ++step) loader.train(step);
  loader.validation(0);
  CHECK(loader.train(5).tokens == fifth.tokens);
  CHECK(again.train(5).tokens == fifth.tokens);
  CHECK(again.train(1'000'000'000).targets == loader.train(1'000'000'000).targets);
  CHECK(other.train(5).tokens != fifth.tokens);
  CHECK(other.validation(1).tokens == loader.validation(1).tokens);
  CHECK(loader.train(6).tokens != fifth.tokens);
  CHECK(loader.train(5 + loader.split().train.count).tokens != fifth.tokens);  // four epochs later, in another order
  REQUIRE(fifth.tokens.size() == 4 * 32);
  for (int64_t b = 0; b < 4; ++b) {
    for (int64_t t = 0; t + 1 < 32; ++t) CHECK(fifth.targets[b * 32 + t] == fifth.tokens[b * 32 + t + 1]);
  }
  error_of(Fault::internal, [&] { loader.train(-1); });
  error_of(Fault::internal, [&] { loader.validation(loader.validation_batches()); });
}

TEST_CASE("a corpus too short for its batch is refused before anything is made") {
  const Scratch folder;
  write_token_file(folder / "a.bin", counting(64), TokenWidth::u16);
  const Corpus corpus = Corpus::open({folder / "a.bin"}, 1000);
  check_mentions(error_of(Fault::data, [&] { Loader(corpus, Protocol::seed, 4, 16, 0); }),
                 {"64 tokens of", "a.bin", "too short", "4 x 16 + 1"});
  check_mentions(error_of(Fault::data, [&] { Loader(corpus, Protocol::seed, 1, 60, 0); }), {"too short", "validation"});
  check_mentions(error_of(Fault::data, [&] { Loader(corpus, Protocol::strict, 1, 8, 0); }), {"at least 2", "found 1"});
  error_of(Fault::data, [&] { Loader(corpus, Protocol::seed, 1, int64_t{1} << 60, 0); });
  error_of(Fault::data, [&] { Loader(corpus, Protocol::seed, int64_t{1} << 60, 16, 0); });
  error_of(Fault::internal, [&] { Loader(corpus, Protocol::seed, 0, 16, 0); });
  CHECK(protocol_from("strict") == Protocol::strict);
  check_mentions(error_of(Fault::usage, [] { protocol_from("fair"); }), {"fair", "seed", "strict"});
}

TEST_CASE("the prefetcher keeps order, stops at once and passes exceptions on") {
  {
    Prefetcher ahead(numbered_batch, 10, 3);
    for (int32_t i = 10; i < 200; ++i) CHECK(ahead.next().tokens[0] == i);
  }
  for (int i = 0; i < 50; ++i) Prefetcher unused(numbered_batch, 0, 1 + i % 3);
  Prefetcher failing(
      [](int64_t i) {
        if (i == 3) fail(Fault::io, "disk gone at {}", i);
        return numbered_batch(i);
      },
      0, 8);
  for (int32_t i = 0; i < 3; ++i) CHECK(failing.next().tokens[0] == i);
  check_mentions(error_of(Fault::io, [&] { failing.next(); }), {"disk gone at 3"});
  check_mentions(error_of(Fault::io, [&] { failing.next(); }), {"disk gone at 3"});
  const Loader loader(Corpus::synthetic({.vocab_size = 100, .tokens = 20'000}), Protocol::seed, 4, 32, 7);
  Prefetcher ahead([&](int64_t step) { return loader.train(step); }, 5);
  CHECK(ahead.next().tokens == loader.train(5).tokens);
  CHECK(ahead.next().targets == loader.train(6).targets);
}

TEST_CASE("the synthetic corpus depends on its options alone and starts documents with id 0") {
  const SyntheticOptions options{.vocab_size = 500, .tokens = 100'000, .seed = 3};
  const Corpus a = Corpus::synthetic(options), b = Corpus::synthetic(options);
  const std::vector<int32_t> tokens = all_of(a);
  CHECK(tokens == all_of(b));
  SyntheticOptions other = options;
  other.seed = 4;
  CHECK(tokens != all_of(Corpus::synthetic(other)));
  other = options;
  other.tokens = 50'000;
  const std::vector<int32_t> half = all_of(Corpus::synthetic(other));
  CHECK(std::equal(half.begin(), half.end(), tokens.begin()));
  CHECK(tokens[0] == 0);
  CHECK(*std::min_element(tokens.begin(), tokens.end()) == 0);
  CHECK(*std::max_element(tokens.begin(), tokens.end()) < 500);
  CHECK(a.documents().size() > 50);
  CHECK(a.vocab_size() == 500);
  error_of(Fault::config, [] { Corpus::synthetic({.vocab_size = 10}); });
  error_of(Fault::config, [] { Corpus::synthetic({.tokens = -1}); });
  error_of(Fault::config, [] { Corpus::synthetic({.copy_rate = std::nan("")}); });
}

TEST_CASE("the synthetic corpus's upper bound is the exact reader's loss") {
  const SyntheticOptions options{.vocab_size = 20,
                                 .tokens = 3000,
                                 .seed = 5,
                                 .topics = 3,
                                 .document_length = 100,
                                 .copy_rate = 0.1,
                                 .copy_length = 6,
                                 .reach = 20};
  const Corpus corpus = Corpus::synthetic(options);
  REQUIRE(corpus.documents().size() > 5);
  CHECK(corpus.entropy().upper == doctest::Approx(dense_reader(options, all_of(corpus))).epsilon(1e-9));
}

// Predictors that know less than the exact reader must lose more, and the entropy must lie where theory puts it.
TEST_CASE("the synthetic corpus's entropy bounds hold") {
  const SyntheticOptions options{.vocab_size = 256, .tokens = 400'000, .seed = 1, .topics = 4};
  const Corpus corpus = Corpus::synthetic(options);
  const std::vector<int32_t> text = all_of(corpus);
  const Entropy& entropy = corpus.entropy();
  CHECK(entropy.tokens == 400'000);
  CHECK(entropy.lower > 1);
  CHECK(entropy.lower < entropy.upper);
  CHECK(entropy.error > 0);
  CHECK(entropy.error < 0.03);

  std::vector<double> count(256, 0);
  for (const int32_t id : text) ++count[id];
  double unigram = 0;
  for (const int32_t id : text) unigram -= std::log(count[id] / 400'000) / 400'000;
  // Nine parts the token that followed the last two tokens' latest occurrence, if any, one part the word frequencies.
  double copying = 0;
  std::vector<int32_t> latest(256 * 256, -1);
  for (size_t t = 2; t < text.size(); ++t) {
    int32_t& seen = latest[text[t - 2] * 256 + text[t - 1]];
    const double hit = seen >= 0 && text[seen] == text[t] ? 0.4 : 0;
    copying -= std::log((seen >= 0 ? 0.6 : 1) * count[text[t]] / 400'000 + hit) / 400'000;
    seen = static_cast<int32_t>(t);
  }
  MESSAGE("lower " << entropy.lower << ", upper " << entropy.upper << " +- " << entropy.error << ", copy model "
                   << copying << ", word frequencies " << unigram);
  CHECK(copying > entropy.upper);
  CHECK(unigram > copying);
  CHECK(unigram > entropy.upper + 0.5);

  SUBCASE("without copies and topics it is the entropy of the words") {
    const SyntheticOptions plain{.vocab_size = 256, .tokens = 400'000, .topics = 1, .topic_share = 0, .copy_rate = 0};
    const Entropy words = Corpus::synthetic(plain).entropy();
    CHECK(words.lower == doctest::Approx(words.upper).epsilon(1e-9));
    double sum = 0, expected = 0;
    for (int r = 0; r < 254; ++r) sum += 1 / (r + 2.7);
    for (int r = 0; r < 254; ++r) expected -= 1 / (r + 2.7) / sum * std::log(1 / (r + 2.7) / sum);
    // A step ends the document with probability e = 1/368; of 400 steps, 32 may not.
    const double e = 1.0 / 368, step = -e * std::log(e) - (1 - e) * std::log(1 - e) + (1 - e) * expected;
    CHECK(std::abs(words.upper - (32 * expected + 368 * step) / 400) < 5 * words.error + 0.01);
  }
}
