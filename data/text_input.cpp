#include "data/text_input.h"

#include <simdjson.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "data/tokenizer_unicode.h"
#include "engine/check.h"

namespace weft {
namespace {
namespace fs = std::filesystem;

constexpr size_t kChunk = 1 << 20;

bool ends_with_any(std::string_view name, std::initializer_list<std::string_view> endings) {
  return std::any_of(endings.begin(), endings.end(), [&](std::string_view e) { return name.ends_with(e); });
}

std::string_view without_compression(std::string_view name) {
  if (name.ends_with(".gz")) return name.substr(0, name.size() - 3);
  if (name.ends_with(".zst")) return name.substr(0, name.size() - 4);
  return name;
}

bool is_jsonl(std::string_view name) { return ends_with_any(without_compression(name), {".jsonl", ".ndjson"}); }

bool is_text_name(std::string_view name) {
  return is_jsonl(name) || ends_with_any(without_compression(name), {".txt", ".text", ".md"});
}

std::string hex(uint64_t hash) { return fmt::format("{:016x}", hash); }

// A file's bytes, hashed as they lie on the disk and decompressed.
class ByteStream {
 public:
  ByteStream(const std::string& path, std::atomic<int64_t>& bytes_read)
      : path_(path),
        bytes_read_(bytes_read),
        file_(std::fopen(path.c_str(), "rb"), &std::fclose),
        input_(kChunk),
        output_(kChunk) {
    if (!file_) fail(Fault::io, "{}: cannot open: {}", path_, std::strerror(errno));
    XXH3_64bits_reset(&hash_);
    if (path_.ends_with(".gz")) {
      gzip_ = true;
      check(inflateInit2(&inflate_, 15 + 16) == Z_OK, "zlib must start");
    } else if (path_.ends_with(".zst")) {
      zstd_.reset(ZSTD_createDCtx());
    }
  }
  ~ByteStream() {
    if (gzip_) inflateEnd(&inflate_);
  }
  ByteStream(const ByteStream&) = delete;

  // The next bytes; empty at the end of the file.
  std::string_view read() {
    for (;;) {
      if (from_ == to_ && !pending_) refill();
      if (from_ == to_ && !pending_) {
        if (inside_) fail(Fault::data, "{}: the compressed data ends too early: truncated?", path_);
        return {};
      }
      if (!gzip_ && !zstd_) {
        const std::string_view all(input_.data(), to_);
        from_ = to_;
        return all;
      }
      const size_t n = gzip_ ? inflate_some() : decompress_some();
      pending_ = inside_ && n == kChunk;
      if (n > 0) return {output_.data(), n};
    }
  }
  std::string hash() const { return hex(XXH3_64bits_digest(&hash_)); }

 private:
  void refill() {
    from_ = 0;
    to_ = std::fread(input_.data(), 1, input_.size(), file_.get());
    if (std::ferror(file_.get())) fail(Fault::io, "{}: cannot read: {}", path_, std::strerror(errno));
    XXH3_64bits_update(&hash_, input_.data(), to_);
    bytes_read_ += static_cast<int64_t>(to_);
  }

  size_t inflate_some() {
    inflate_.next_in = reinterpret_cast<Bytef*>(input_.data() + from_);
    inflate_.avail_in = static_cast<uInt>(to_ - from_);
    inflate_.next_out = reinterpret_cast<Bytef*>(output_.data());
    inflate_.avail_out = kChunk;
    const int result = inflate(&inflate_, Z_NO_FLUSH);
    from_ = to_ - inflate_.avail_in;
    if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
      fail(Fault::data, "{}: damaged or no gzip data: {}", path_, inflate_.msg ? inflate_.msg : "unknown");
    }
    inside_ = result != Z_STREAM_END;
    if (!inside_) inflateReset(&inflate_);  // another member may follow
    return kChunk - inflate_.avail_out;
  }

  size_t decompress_some() {
    ZSTD_inBuffer in{input_.data(), to_, from_};
    ZSTD_outBuffer out{output_.data(), kChunk, 0};
    const size_t result = ZSTD_decompressStream(zstd_.get(), &out, &in);
    if (ZSTD_isError(result)) fail(Fault::data, "{}: damaged or no zstd data: {}", path_, ZSTD_getErrorName(result));
    from_ = in.pos;
    inside_ = result != 0;
    return out.pos;
  }

  std::string path_;
  std::atomic<int64_t>& bytes_read_;
  std::unique_ptr<FILE, int (*)(FILE*)> file_;
  std::vector<char> input_, output_;
  size_t from_ = 0, to_ = 0;
  XXH3_state_t hash_;
  bool gzip_ = false;
  bool inside_ = false;   // a compressed stream has begun and not ended
  bool pending_ = false;  // there is more output to the input used so far
  z_stream inflate_{};
  std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> zstd_{nullptr, &ZSTD_freeDCtx};
};

// What is not text, by its first bytes.
void check_head(const std::string& path, std::string_view head) {
  using namespace std::string_view_literals;
  if (head.starts_with("\xff\xfe"sv) || head.starts_with("\xfe\xff"sv)) {
    fail(Fault::data, "{}: UTF-16 text, expected UTF-8; convert it with `iconv -f UTF-16 -t UTF-8`", path);
  }
  if (head.starts_with("\x1f\x8b"sv)) fail(Fault::data, "{}: gzip data, but the name does not end in .gz", path);
  if (head.starts_with("\x28\xb5\x2f\xfd"sv))
    fail(Fault::data, "{}: zstd data, but the name does not end in .zst", path);
}

// How much of the text is whole code points, if it is valid up to there.
size_t whole_code_points(std::string_view text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return length > back ? text.size() - back : text.size();
  }
  return text.size();
}

// The length in bytes of the first `n` code points.
size_t bytes_of_code_points(std::string_view text, int64_t n) {
  const char* p = text.data();
  while (n-- > 0 && p < text.data() + text.size()) next_code_point(p);
  return static_cast<size_t>(p - text.data());
}

// \ud800 without its other half, in a JSON line, becomes \ufffd.
std::string replace_lone_surrogates(std::string line) {
  const auto unit = [&](size_t i) -> int {
    if (i + 6 > line.size() || line[i] != '\\' || line[i + 1] != 'u') return -1;
    char* end = nullptr;
    const std::string digits = line.substr(i + 2, 4);
    const long code = std::strtol(digits.c_str(), &end, 16);
    return *end == 0 ? static_cast<int>(code) : -1;
  };
  for (size_t i = 0; i + 1 < line.size(); ++i) {
    if (line[i] != '\\') continue;
    const int code = unit(i), other = unit(i + 6);
    if (code >= 0xD800 && code <= 0xDBFF && other >= 0xDC00 && other <= 0xDFFF) {
      i += 11;
    } else if (code >= 0xD800 && code <= 0xDFFF) {
      line.replace(i, 6, "\\ufffd");
      i += 5;
    } else {
      ++i;  // what is escaped is not looked at
    }
  }
  return line;
}

// Puts text together to documents and cuts them.
class Documents {
 public:
  Documents(const TextOptions& options, const std::function<bool(TextPart)>& take) : options_(options), take_(take) {}

  bool stopped() const { return stopped_; }
  int64_t count() const { return count_; }

  void begin(std::string where) {
    where_ = std::move(where);
    chars_ = 0;
  }

  // More text of the document. Whole code points.
  void add(std::string_view text) {
    if (stopped_) return;
    if (options_.first_chars > 0) {
      const size_t used = bytes_of_code_points(text, options_.first_chars - chars_);
      text = text.substr(0, used);
      chars_ += count_code_points(text);
    }
    if (options_.document_chars == 0) {
      text_ += text;
      hand_on_parts();
      return;
    }
    rest_ += text;
    size_t from = 0;
    for (size_t at; (at = rest_.find("\n\n", from)) != std::string::npos; from = at + 2) {
      add_paragraph(std::string_view(rest_).substr(from, at - from));
    }
    rest_.erase(0, from);
    check_size(rest_.size());
  }

  void end() {
    if (options_.document_chars > 0) {
      add_paragraph(rest_);
      rest_.clear();
      document_chars_ = 0;
    }
    end_document();
  }

 private:
  void add_paragraph(std::string_view paragraph) {
    const int64_t chars = count_code_points(paragraph);
    if (!text_.empty() && document_chars_ + chars > options_.document_chars) end_document();
    if (text_.empty()) {
      text_ = paragraph;
      document_chars_ = chars;
    } else {
      text_.append("\n\n").append(paragraph);
      document_chars_ += chars + 2;
    }
  }

  void check_size(size_t bytes) const {
    if (static_cast<int64_t>(bytes) > options_.max_line) {
      fail(Fault::data, "{}: a document or paragraph has more than {} bytes (--max-line)", where_, options_.max_line);
    }
  }

  void hand_on_parts() {
    if (text_.size() < 2 * kChunk) return;
    if (!options_.may_split) return check_size(text_.size());
    for (size_t i = text_.size() - 1; i > 0; --i) {
      const auto before = static_cast<unsigned char>(text_[i - 1]);
      if (text_[i] != ' ' || before >= 0x80 || !std::isalnum(before)) continue;
      std::string later = text_.substr(i);
      text_.resize(i);
      hand_on();
      text_ = std::move(later);
      return;
    }
    check_size(text_.size());
  }

  void end_document() {
    if (!text_.empty()) hand_on();
    started_ = false;
  }

  void hand_on() {
    if (stopped_ || (!started_ && options_.documents > 0 && count_ == options_.documents)) {
      stopped_ = true;
      text_.clear();
      return;
    }
    count_ += !started_;
    stopped_ = !take_({std::move(text_), !started_, where_});
    text_.clear();
    started_ = true;
  }

  const TextOptions& options_;
  const std::function<bool(TextPart)>& take_;
  std::string where_;
  std::string text_;  // of the document that is not handed on yet
  std::string rest_;  // the paragraph that is not complete
  int64_t chars_ = 0, document_chars_ = 0, count_ = 0;
  bool started_ = false, stopped_ = false;
};

class FileReader {
 public:
  FileReader(const TextOptions& options, const std::string& path, ByteStream& bytes, Documents& documents)
      : options_(options), path_(path), bytes_(bytes), documents_(documents) {}

  // True if the file was read to its end.
  bool read() {
    const bool jsonl = is_jsonl(path_);
    if (!jsonl) documents_.begin(path_);
    bool first = true;
    for (std::string_view bytes; !(bytes = bytes_.read()).empty();) {
      buffer_ += bytes;
      if (first) {
        if (buffer_.size() < 4) continue;
        begin();
        first = false;
      }
      jsonl ? take_lines() : take_text(whole_code_points(buffer_));
      if (documents_.stopped()) return false;
    }
    if (first) begin();
    if (jsonl) {
      if (!buffer_.empty()) take_line(buffer_, true);
    } else {
      take_text(buffer_.size());
      documents_.end();
    }
    return !documents_.stopped();
  }

  int64_t bad_lines() const { return bad_lines_; }

 private:
  void begin() {
    check_head(path_, buffer_);
    if (buffer_.starts_with("\xEF\xBB\xBF")) {
      buffer_.erase(0, 3);
      offset_ = 3;
    }
  }

  void take_text(size_t n) {
    const std::string_view text = std::string_view(buffer_).substr(0, n);
    const size_t bad = find_invalid_utf8(text);
    if (bad == std::string_view::npos) {
      documents_.add(text);
    } else if (options_.invalid_utf8 == InvalidUtf8::replace) {
      documents_.add(replace_invalid_utf8(text));
    } else {
      fail(Fault::data, "{}@{}: invalid UTF-8, byte 0x{:02x} (--invalid-utf8=replace accepts it)", path_, offset_ + bad,
           static_cast<unsigned char>(text[bad]));
    }
    offset_ += n;
    buffer_.erase(0, n);
  }

  void take_lines() {
    size_t from = 0;
    for (size_t at; !documents_.stopped() && (at = buffer_.find('\n', std::max(from, searched_))) != std::string::npos;
         from = at + 1) {
      take_line(std::string_view(buffer_).substr(from, at - from), false);
      searched_ = 0;
    }
    buffer_.erase(0, from);
    searched_ = buffer_.size();
    if (static_cast<int64_t>(buffer_.size()) > options_.max_line) {
      fail(Fault::data, "{}:{}: the line has more than {} bytes (--max-line)", path_, line_ + 1, options_.max_line);
    }
  }

  template <class... A>
  void bad_line(const char* format, const A&... args) {
    if (options_.bad_line == BadLine::stop) fail(Fault::data, format, path_, line_, args...);
    ++bad_lines_;
  }

  void take_line(std::string_view line, bool last) {
    ++line_;
    if (static_cast<int64_t>(line.size()) > options_.max_line) {
      fail(Fault::data, "{}:{}: the line has more than {} bytes (--max-line)", path_, line_, options_.max_line);
    }
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) return;
    const bool replace = options_.invalid_utf8 == InvalidUtf8::replace;
    const size_t bad = find_invalid_utf8(line);
    if (bad == std::string_view::npos) {
      json_ = line;
    } else if (replace) {
      json_ = replace_invalid_utf8(line);
    } else {
      return bad_line("{}:{}: invalid UTF-8 at byte {} of the line, 0x{:02x} (--invalid-utf8=replace accepts it)", bad,
                      static_cast<unsigned char>(line[bad]));
    }
    simdjson::dom::element root;
    auto error = parse().get(root);
    if (error == simdjson::STRING_ERROR && replace) {
      json_ = replace_lone_surrogates(std::move(json_));
      error = parse().get(root);
    }
    if (error == simdjson::STRING_ERROR) {
      return bad_line(
          "{}:{}: a string is malformed, perhaps half a \\ud800 pair (--invalid-utf8=replace accepts that)");
    }
    if (error) {
      return bad_line("{}:{}: is not JSON: {}{}", simdjson::error_message(error),
                      last ? " (the last line, without a line end: torn?)" : "");
    }
    simdjson::dom::object object;
    if (root.get(object)) return bad_line("{}:{}: is {}, expected an object", type_of(root));
    simdjson::dom::element value;
    if (object.at_key(options_.field).get(value)) return bad_line("{}:{}: has no field \"{}\"", options_.field);
    std::string_view text;
    if (value.get(text))
      return bad_line("{}:{}: field \"{}\" is {}, expected a string", options_.field, type_of(value));
    documents_.begin(fmt::format("{}:{}", path_, line_));
    documents_.add(text);
    documents_.end();
  }

  simdjson::simdjson_result<simdjson::dom::element> parse() {
    json_.reserve(json_.size() + simdjson::SIMDJSON_PADDING);
    return parser_.parse(json_.data(), json_.size(), false);
  }

  static const char* type_of(simdjson::dom::element value) {
    switch (value.type()) {
      case simdjson::dom::element_type::ARRAY:
        return "an array";
      case simdjson::dom::element_type::OBJECT:
        return "an object";
      case simdjson::dom::element_type::STRING:
        return "a string";
      case simdjson::dom::element_type::BOOL:
        return "true or false";
      case simdjson::dom::element_type::NULL_VALUE:
        return "null";
      default:
        return "a number";
    }
  }

  const TextOptions& options_;
  const std::string& path_;
  ByteStream& bytes_;
  Documents& documents_;
  std::string buffer_, json_;
  simdjson::dom::parser parser_;
  size_t offset_ = 0, searched_ = 0;
  int64_t line_ = 0, bad_lines_ = 0;
};

}  // namespace

TextInput::TextInput(const std::vector<std::string>& inputs, TextOptions options) : options_(std::move(options)) {
  std::vector<std::string> paths;
  for (const std::string& input : inputs) {
    std::error_code error;
    if (!fs::is_directory(input, error)) {
      paths.push_back(input);
      continue;
    }
    std::vector<std::string> found;
    int64_t others = 0;
    for (auto entry = fs::recursive_directory_iterator(input, error);
         !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
      if (!entry->is_regular_file(error)) continue;
      is_text_name(entry->path().filename().string()) ? found.push_back(entry->path().string()) : void(++others);
    }
    if (error) fail(Fault::io, "{}: cannot list: {}", input, error.message());
    if (found.empty()) {
      fail(
          Fault::data,
          "{}: no documents: none of the folder's {} files is .txt, .text, .md, .jsonl or .ndjson (or their .gz, .zst)",
          input, others);
    }
    if (others > 0)
      warnings_.push_back(fmt::format("{}: {} files that are no text by their names are left out", input, others));
    std::sort(found.begin(), found.end());
    paths.insert(paths.end(), found.begin(), found.end());
  }
  for (const std::string& path : paths) {
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
      fail(Fault::io, "{}: {}", path, fs::exists(path) ? "is not a regular file" : "no such file or folder");
    }
    const auto bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (error) fail(Fault::io, "{}: cannot read its size: {}", path, error.message());
    total_bytes_ += bytes;
    sources_.push_back({path, bytes, 0, ""});
  }
}

void TextInput::read(const std::function<bool(TextPart)>& take) {
  Documents documents(options_, take);
  for (TextSource& source : sources_) {
    if (documents.stopped()) break;
    const int64_t before = documents.count();
    ByteStream bytes(source.path, bytes_read_);
    FileReader reader(options_, source.path, bytes, documents);
    if (reader.read()) source.hash = bytes.hash();
    bad_lines_ += reader.bad_lines();
    source.documents = documents.count() - before;
    if (source.documents == 0 && !documents.stopped()) warnings_.push_back(source.path + ": no documents in it");
  }
  if (documents.count() == 0) {
    fail(Fault::data, "{}{}: no documents: nothing but empty files, blank lines or empty texts",
         sources_.empty() ? "input" : sources_.front().path, sources_.size() > 1 ? " and the others" : "");
  }
}

std::string hash_file(const std::string& path) {
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (!file) fail(Fault::io, "{}: cannot open: {}", path, std::strerror(errno));
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  std::vector<char> buffer(kChunk);
  while (const size_t n = std::fread(buffer.data(), 1, buffer.size(), file.get())) {
    XXH3_64bits_update(&state, buffer.data(), n);
  }
  if (std::ferror(file.get())) fail(Fault::io, "{}: cannot read: {}", path, std::strerror(errno));
  return hex(XXH3_64bits_digest(&state));
}

}  // namespace weft
