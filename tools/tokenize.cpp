// tokenize: text files, folders and JSONL to token files with a manifest. One thread reads and cuts documents, the
// others encode them, and this one writes them in the order read: the files do not depend on the number of threads.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <thread>

#include "data/manifest.h"
#include "data/text_input.h"
#include "data/token_file.h"
#include "data/tokenizer.h"
#include "data/tokenizer_file.h"
#include "data/tokenizer_unicode.h"
#include "engine/check.h"
#include "engine/random.h"

namespace weft {
namespace {
namespace fs = std::filesystem;

volatile std::sig_atomic_t interrupted = 0;

struct Options {
  std::string tokenizer, out, document_token = "<|endoftext|>", special_in_text, invalid_utf8 = "stop",
                              bad_line = "stop";
  bool bytes = false, standard_input = false, document_token_given = false;
  std::vector<std::string> inputs;
  int64_t max_tokens = 0, shard_tokens = 100'000'000, threads = 0, seed = 0;
  double val_fraction = 0;
  TextOptions text;
};

// Some consecutive parts of the text, and then their ids.
struct Batch {
  std::vector<TextPart> parts;
  std::vector<std::vector<int32_t>> ids;
};

// Reader, encoders and writer meet here. At most `room` batches are on the way, so memory is bounded.
class Pipeline {
 public:
  Pipeline(TextInput& input, const Tokenizer& tokenizer, SpecialText special, int64_t threads)
      : input_(input), tokenizer_(tokenizer), special_(special), room_(4 * threads) {
    reader_ = std::jthread([this] { guarded([&] { read(); }); });
    for (int64_t i = 0; i < threads; ++i) encoders_.emplace_back([this] { guarded([&] { encode(); }); });
  }
  ~Pipeline() { stop(); }

  // The next batch in order; false at the end. Throws what a thread threw, once all that was before it is handed out.
  bool next(Batch& batch, std::chrono::milliseconds patience, bool& late) {
    std::unique_lock lock(mutex_);
    late = !changed_.wait_for(lock, patience,
                              [&] { return done_.contains(written_) || failure_ || (read_all_ && written_ == read_); });
    if (late) return true;
    if (failure_) std::rethrow_exception(failure_);
    const auto found = done_.find(written_);
    if (found == done_.end()) return false;
    batch = std::move(found->second);
    done_.erase(found);
    ++written_;
    changed_.notify_all();
    return true;
  }

  // Ends all threads; afterwards the input's counts stand still.
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (reader_.joinable()) reader_.join();
    for (std::jthread& encoder : encoders_) {
      if (encoder.joinable()) encoder.join();
    }
  }
  int64_t special_found() const { return special_found_; }

 private:
  template <class F>
  void guarded(F work) {
    try {
      work();
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    changed_.notify_all();
  }

  void read() {
    constexpr size_t kBatchBytes = 1 << 18;
    Batch batch;
    size_t bytes = 0;
    const auto push = [&] {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || read_ - written_ < room_; });
      waiting_.push_back({read_++, std::move(batch)});
      batch = {};
      bytes = 0;
      changed_.notify_all();
      return !stopping_;
    };
    input_.read([&](TextPart part) {
      bytes += part.text.size();
      batch.parts.push_back(std::move(part));
      return bytes < kBatchBytes || push();
    });
    if (!batch.parts.empty()) push();
    std::lock_guard lock(mutex_);
    read_all_ = true;
  }

  void encode() {
    Encoder encoder(tokenizer_, special_);
    for (;;) {
      std::pair<int64_t, Batch> work;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || failure_ || !waiting_.empty() || read_all_; });
        if (stopping_ || failure_ || waiting_.empty()) {
          special_found_ += encoder.special_found();
          return;
        }
        work = std::move(waiting_.front());
        waiting_.pop_front();
      }
      for (TextPart& part : work.second.parts) {
        std::vector<int32_t>& ids = work.second.ids.emplace_back();
        ids.reserve(part.text.size() / 3);
        try {
          encoder.encode(part.text, ids);
        } catch (const Error& e) {
          fail(e.fault(), "{}: {}", part.where, e.what());
        }
      }
      std::lock_guard lock(mutex_);
      done_.emplace(work.first, std::move(work.second));
      changed_.notify_all();
    }
  }

  TextInput& input_;
  const Tokenizer& tokenizer_;
  SpecialText special_;
  int64_t room_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<int64_t, Batch>> waiting_;
  std::map<int64_t, Batch> done_;
  int64_t read_ = 0, written_ = 0, special_found_ = 0;
  bool read_all_ = false, stopping_ = false;
  std::exception_ptr failure_;
  std::jthread reader_;
  std::vector<std::jthread> encoders_;
};

// One side of the split: numbered token files.
class ShardWriter {
 public:
  ShardWriter(std::string folder, std::string split, TokenWidth width, int64_t shard_tokens)
      : folder_(std::move(folder)), split_(std::move(split)), width_(width), shard_tokens_(shard_tokens) {}

  void begin_document() { starts_document_ = true; }
  void append(std::span<const int32_t> ids) {
    while (!ids.empty()) {
      if (!writer_) {
        shard_ = {fmt::format("{}_{:06}.bin", split_, shards_.size()), split_, 0, 0, 0, ""};
        writer_.emplace((fs::path(folder_) / shard_.file).string(), width_);
      }
      shard_.documents += starts_document_;
      starts_document_ = false;
      const auto n = std::min(ids.size(), static_cast<size_t>(shard_tokens_ - writer_->size()));
      writer_->append(ids.first(n));
      ids = ids.subspan(n);
      tokens_ += static_cast<int64_t>(n);
      if (writer_->size() == shard_tokens_) finish();
    }
  }
  void finish() {
    if (!writer_) return;
    writer_->finish();
    shard_.tokens = writer_->size();
    shard_.bytes = static_cast<int64_t>(fs::file_size(writer_->path()));
    shard_.hash = hash_file(writer_->path());
    shards_.push_back(shard_);
    writer_.reset();
  }
  int64_t tokens() const { return tokens_; }
  const std::vector<Shard>& shards() const { return shards_; }

 private:
  std::string folder_, split_;
  TokenWidth width_;
  int64_t shard_tokens_, tokens_ = 0;
  bool starts_document_ = false;
  Shard shard_;
  std::optional<TokenWriter> writer_;
  std::vector<Shard> shards_;
};

// The output folder under another name until all in it is done; removed if that does not come.
class Staging {
 public:
  explicit Staging(const std::string& out) : out_(fs::path(out).lexically_normal()) {
    if (!out_.has_filename()) out_ = out_.parent_path();
    std::error_code error;
    if (fs::exists(out_, error) && !(fs::is_directory(out_, error) && fs::is_empty(out_, error))) {
      fail(Fault::usage, "--out {}: exists and is not an empty folder", out);
    }
    path_ = out_;
    path_ += fmt::format(".unfinished.{}", ::getpid());
    fs::create_directories(path_, error);
    if (error) fail(Fault::io, "--out {}: cannot create {}: {}", out, path_.string(), error.message());
  }
  ~Staging() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  std::string path() const { return path_.string(); }
  void publish() {
    std::error_code error;
    fs::rename(path_, out_, error);
    if (error) fail(Fault::io, "--out {}: cannot rename {}: {}", out_.string(), path_.string(), error.message());
  }

 private:
  fs::path out_, path_;
};

class Progress {
 public:
  explicit Progress(int64_t total_bytes) : total_(std::max<int64_t>(total_bytes, 1)), terminal_(::isatty(2)) {}
  void show(int64_t bytes, int64_t tokens) {
    const double now = seconds();
    if (now - shown_ < (terminal_ ? 0.2 : 10)) return;
    shown_ = now;
    const double share = static_cast<double>(bytes) / static_cast<double>(total_);
    fmt::print(stderr, "{}{:5.1f}%  {:.1f} of {:.1f} MB  {:.2f}M tokens  {:.1f} MB/s  ETA {:.0f} s{}",
               terminal_ ? "\r" : "", 100 * share, bytes / 1e6, total_ / 1e6, tokens / 1e6, bytes / 1e6 / now,
               share > 0 ? now / share - now : 0, terminal_ ? "  " : "\n");
    std::fflush(stderr);
  }
  void end() const {
    if (terminal_ && shown_ > 0) fmt::print(stderr, "\r{:80}\r", "");
  }
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  int64_t total_;
  bool terminal_;
  double shown_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

int print_ids(const Options& o, const Tokenizer& tokenizer) {
  std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  if (const size_t bad = find_invalid_utf8(text); bad != std::string::npos && !tokenizer.is_bytes()) {
    if (o.text.invalid_utf8 == InvalidUtf8::stop) {
      fail(Fault::data, "standard input@{}: invalid UTF-8, byte 0x{:02x} (--invalid-utf8=replace accepts it)", bad,
           static_cast<unsigned char>(text[bad]));
    }
    text = replace_invalid_utf8(text);
  }
  std::vector<int32_t> ids;
  Encoder(tokenizer, special_text_from(o.special_in_text.empty() ? "allow" : o.special_in_text)).encode(text, ids);
  std::string lines;
  for (const int32_t id : ids) lines += fmt::format("{}\n", id);
  std::fwrite(lines.data(), 1, lines.size(), stdout);
  if (std::fflush(stdout) != 0) fail(Fault::io, "standard output: cannot be written");
  return 0;
}

int run(const Options& o) {
  const Tokenizer tokenizer = o.bytes ? Tokenizer::bytes() : Tokenizer::open(o.tokenizer);
  for (const std::string& warning : tokenizer.warnings()) fmt::print(stderr, "tokenize: warning: {}\n", warning);
  if (o.standard_input) return print_ids(o, tokenizer);

  const std::string special = o.special_in_text.empty() ? "plain" : o.special_in_text;
  std::string document_token = o.document_token;
  const int32_t document_id = document_token.empty() ? -1 : tokenizer.id_of(document_token);
  if (document_id < 0 && !document_token.empty()) {
    if (o.document_token_given)
      fail(Fault::usage, "--document-token {}: {} has no such token", document_token, o.tokenizer);
    fmt::print(stderr, "tokenize: warning: the tokenizer has no {}: documents follow each other without a mark\n",
               document_token);
    document_token.clear();
  }
  TextOptions text = o.text;
  text.may_split = tokenizer.may_split();
  TextInput input(o.inputs, text);
  Staging staging(o.out);
  const TokenWidth width = tokenizer.vocab_size() <= 65536 ? TokenWidth::u16 : TokenWidth::u32;
  ShardWriter train(staging.path(), "train", width, o.shard_tokens), val(staging.path(), "val", width, o.shard_tokens);
  const auto threads = o.threads > 0 ? o.threads : std::max<int64_t>(1, std::thread::hardware_concurrency());
  Progress progress(input.total_bytes());
  Pipeline pipeline(input, tokenizer, special_text_from(special), threads);

  ShardWriter* side = &train;
  int64_t documents = 0, held_out = 0, tokens = 0, bytes = 0, characters = 0;
  Batch batch;
  const RngKey split{static_cast<uint64_t>(o.seed), stream_of("held-out documents")};
  const auto limit = [&] { return o.max_tokens > 0 ? o.max_tokens - tokens : std::numeric_limits<int64_t>::max(); };
  for (bool late = false; limit() > 0 && pipeline.next(batch, std::chrono::milliseconds(200), late);) {
    if (interrupted) return 130;
    progress.show(input.bytes_read(), tokens);
    if (late) continue;
    for (size_t i = 0; i < batch.parts.size() && limit() > 0; ++i) {
      const auto put = [&](std::span<const int32_t> ids) {
        const auto n = std::min(ids.size(), static_cast<size_t>(limit()));
        side->append(ids.first(n));
        tokens += static_cast<int64_t>(n);
      };
      if (batch.parts[i].starts_document) {
        const bool out = to_uniform(random_bits(split, static_cast<uint64_t>(documents))) < o.val_fraction;
        side = out ? &val : &train;
        side->begin_document();
        ++documents;
        held_out += out;
        if (document_id >= 0) put({&document_id, 1});
      }
      put(batch.ids[i]);
      bytes += static_cast<int64_t>(batch.parts[i].text.size());
      characters += count_code_points(batch.parts[i].text);
    }
  }
  pipeline.stop();
  train.finish();
  val.finish();
  progress.end();
  if (o.val_fraction > 0 && (train.tokens() == 0 || val.tokens() == 0)) {
    fail(Fault::data, "--val-fraction {}: of {} documents {} would be held out: each side needs one", o.val_fraction,
         documents, held_out);
  }

  Manifest manifest;
  manifest.tokenizer = o.bytes ? "bytes" : fs::path(o.tokenizer).filename().string();
  manifest.tokenizer_hash = tokenizer.hash();
  manifest.vocab_size = tokenizer.vocab_size();
  manifest.document_token = document_token;
  manifest.document_token_id = document_id;
  const auto number = [](auto value) { return fmt::format("{}", value); };
  manifest.options = {{"field", json_string(text.field)},        {"document_chars", number(text.document_chars)},
                      {"first_chars", number(text.first_chars)}, {"documents", number(text.documents)},
                      {"max_tokens", number(o.max_tokens)},      {"shard_tokens", number(o.shard_tokens)},
                      {"val_fraction", number(o.val_fraction)},  {"seed", number(o.seed)},
                      {"special_in_text", json_string(special)}, {"invalid_utf8", json_string(o.invalid_utf8)},
                      {"on_bad_line", json_string(o.bad_line)}};
  manifest.counts = {{"documents", documents},
                     {"held_out_documents", held_out},
                     {"tokens", tokens},
                     {"characters", characters},
                     {"bytes", bytes}};
  manifest.sources = input.sources();
  if (limit() > 0) {
    manifest.counts.push_back({"bad_lines", input.bad_lines()});
    manifest.counts.push_back({"special_in_text", pipeline.special_found()});
  } else {
    // How far the reader ran ahead of --max-tokens depends on the threads' timing: not for the manifest.
    for (TextSource& source : manifest.sources) source = {source.path, source.bytes, -1, ""};
  }
  for (const ShardWriter* writer : {&train, &val}) {
    manifest.shards.insert(manifest.shards.end(), writer->shards().begin(), writer->shards().end());
  }
  write_manifest(manifest, staging.path());
  staging.publish();
  for (const std::string& warning : input.warnings()) fmt::print(stderr, "tokenize: warning: {}\n", warning);
  if (input.bad_lines() > 0) fmt::print(stderr, "tokenize: warning: {} bad lines skipped\n", input.bad_lines());
  fmt::print(stderr, "{} tokens of {} documents ({} held out) in {} files at {}; {:.1f} s, {:.1f} MB/s\n", tokens,
             documents, held_out, manifest.shards.size(), o.out, progress.seconds(), bytes / 1e6 / progress.seconds());
  return 0;
}

int main_of(int argc, char** argv) {
  CLI::App app("Text files, folders and JSONL (plain, .gz, .zst) to token files for train_exp1 --data.");
  app.footer(
      "Example: tokenize --tokenizer tokenizer.json --out tokens --document-chars 3000 books/\n"
      "Exit codes: 0 done, 1 a bug, 2 command line, 4 input data, 5 reading or writing, 130 stopped by Ctrl-C.");
  Options o;
  auto* tokenizer = app.add_option("--tokenizer", o.tokenizer, "tokenizer.json of Hugging Face's form, byte-level BPE");
  app.add_flag("--bytes", o.bytes, "a token for each byte instead; id 256 is <|endoftext|>")->excludes(tokenizer);
  app.add_option("INPUT", o.inputs, "text files, folders, JSONL files");
  app.add_option("--out", o.out, "folder of the token files, new or empty");
  app.add_flag("--stdin", o.standard_input, "encode standard input as one document and print its ids, one per line");
  auto* document = app.add_option("--document-token", o.document_token, "token before each document; '' for none")
                       ->capture_default_str();
  app.add_option("--document-chars", o.text.document_chars,
                 "cut text at blank lines into documents of about this many characters; 0: do not cut")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--first-chars", o.text.first_chars,
                 "use only the first characters of each document (before cutting); 0: all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--documents", o.text.documents, "use only the first documents; 0: all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--max-tokens", o.max_tokens, "stop after this many tokens; 0: all")->check(CLI::NonNegativeNumber);
  app.add_option("--field", o.text.field, "the field of a JSONL line that holds the text")->capture_default_str();
  app.add_option("--shard-tokens", o.shard_tokens, "tokens in a file")
      ->check(CLI::Range(int64_t{1}, int64_t{2147483647}))
      ->capture_default_str();
  app.add_option("--val-fraction", o.val_fraction,
                 "hold out this share of the documents, drawn at random, as val_*.bin")
      ->check(CLI::Range(0.0, 0.999));
  app.add_option("--seed", o.seed, "of the draw of held-out documents")->check(CLI::NonNegativeNumber);
  app.add_option("-j,--threads", o.threads, "threads that encode; 0: all cores")->check(CLI::Range(0, 1024));
  app.add_option("--special-in-text", o.special_in_text,
                 "text that is a special token's name: allow (becomes that token), plain (is text) or error; "
                 "default plain, with --stdin allow")
      ->check(CLI::IsMember({"allow", "plain", "error"}));
  app.add_option("--invalid-utf8", o.invalid_utf8, "stop, or replace by U+FFFD")
      ->check(CLI::IsMember({"stop", "replace"}));
  app.add_option("--on-bad-line", o.bad_line, "of JSONL: stop or skip")->check(CLI::IsMember({"stop", "skip"}));
  app.add_option("--max-line", o.text.max_line, "bytes of a JSONL line at most")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : static_cast<int>(Fault::usage);
  }
  o.document_token_given = document->count() > 0;
  o.text.invalid_utf8 = o.invalid_utf8 == "replace" ? InvalidUtf8::replace : InvalidUtf8::stop;
  o.text.bad_line = o.bad_line == "skip" ? BadLine::skip : BadLine::stop;
  if (!o.bytes && o.tokenizer.empty())
    fail(Fault::usage, "one of --tokenizer and --bytes is needed (see tokenize --help)");
  if (o.standard_input) {
    if (!o.out.empty() || !o.inputs.empty()) fail(Fault::usage, "--stdin takes no INPUT and no --out");
  } else if (o.out.empty() || o.inputs.empty()) {
    fail(Fault::usage, "--out and at least one INPUT are needed, or --stdin (see tokenize --help)");
  }
  std::signal(SIGINT, [](int) { interrupted = 1; });
  std::signal(SIGTERM, [](int) { interrupted = 1; });
  return run(o);
}

}  // namespace
}  // namespace weft

int main(int argc, char** argv) {
  return weft::run_program("tokenize", [&] { return weft::main_of(argc, argv); });
}
