#include "data/token_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/check.h"

namespace weft {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are read and written as little-endian memory");

constexpr int64_t kHeaderInts = 256;
constexpr int64_t kHeaderBytes = kHeaderInts * 4;

struct Format {
  int32_t magic, version;
  TokenWidth width;
};
constexpr Format kFormats[] = {{20240520, 1, TokenWidth::u16}, {20240801, 7, TokenWidth::u32}};

int64_t bytes_of(TokenWidth width) { return static_cast<int64_t>(width); }

std::string reason() { return std::strerror(errno); }

// Closes on every way out of a function that may throw; `release` hands the descriptor on.
class Descriptor {
 public:
  explicit Descriptor(int file) : file_(file) {}
  ~Descriptor() {
    if (file_ >= 0) ::close(file_);
  }
  Descriptor(const Descriptor&) = delete;
  int get() const { return file_; }
  int release() { return std::exchange(file_, -1); }

 private:
  int file_;
};

bool is_text(std::string_view head) {
  return std::all_of(head.begin(), head.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte >= 0x20 || byte == '\n' || byte == '\r' || byte == '\t';
  });
}

// What a file that is no token file seems to be, from its first bytes.
std::string looks_like(std::string_view head, int64_t file_bytes) {
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, const char*> kStarts[] = {
      {"\x1f\x8b"sv, "a gzip archive; decompress it first"},
      {"PK\x03\x04"sv, "a zip archive (also the form of .npz and PyTorch files)"},
      {"\x28\xb5\x2f\xfd"sv, "zstandard-compressed data; decompress it first"},
      {"\xfd"
       "7zXZ"sv,
       "xz-compressed data; decompress it first"},
      {"\x93NUMPY"sv, "a NumPy .npy array"},
      {"PAR1"sv, "a Parquet table"},
      {"ARROW1"sv, "an Arrow table"},
      {"\x80\x02"sv, "a Python pickle"},
      {"\x80\x04"sv, "a Python pickle"},
      {"\x7f"
       "ELF"sv,
       "a program"},
      {"GGUF"sv, "a GGUF model"},
      {"%PDF"sv, "a PDF document"},
      {"\xff\xfe"sv, "UTF-16 text; tokenize it first"},
      {"\xfe\xff"sv, "UTF-16 text; tokenize it first"},
      {"\xef\xbb\xbf"sv, "UTF-8 text; tokenize it first"},
  };
  for (const auto& [start, what] : kStarts) {
    if (head.starts_with(start)) return what;
  }
  int32_t magic = 0;
  if (head.size() >= 4) std::memcpy(&magic, head.data(), 4);
  const auto swapped = static_cast<int32_t>(__builtin_bswap32(static_cast<uint32_t>(magic)));
  for (const Format& format : kFormats) {
    if (swapped == format.magic) return "a token file written on a big-endian machine";
  }
  if (magic == 20240522) return "an llm.c evaluation file, not a training shard";
  if (magic == 20240326 || magic == 20240328 || magic == 20240527) return "an llm.c model, tokenizer or optimizer file";
  if (head.size() >= 9 && head[8] == '{') {
    uint64_t header = 0;
    std::memcpy(&header, head.data(), 8);
    if (header <= static_cast<uint64_t>(file_bytes) - 8) return "a safetensors file";
  }
  if (std::all_of(head.begin(), head.end(), [](char c) { return c == 0; })) {
    return "nothing but zeros (an incomplete copy?)";
  }
  if (is_text(head)) {
    const size_t first = head.find_first_not_of(" \t\r\n");
    const bool json = first != std::string_view::npos && (head[first] == '{' || head[first] == '[');
    return json ? "JSON text; tokenize it first" : "plain text; tokenize it first";
  }
  return file_bytes % 2 == 0 ? "no format weft knows (perhaps tokens without a header)" : "no format weft knows";
}

const Format& format_of(const std::string& path, std::string_view head, int64_t file_bytes) {
  int32_t magic = 0, version = 0;
  if (head.size() >= 8) {
    std::memcpy(&magic, head.data(), 4);
    std::memcpy(&version, head.data() + 4, 4);
  }
  const auto* format = std::find_if(std::begin(kFormats), std::end(kFormats),
                                    [&](const Format& f) { return head.size() >= 8 && f.magic == magic; });
  if (format == std::end(kFormats)) {
    fail(Fault::data, "{}: not a token file: expected magic 20240520 or 20240801, found {}. It looks like {}", path,
         magic, looks_like(head, file_bytes));
  }
  if (version != format->version) {
    fail(Fault::data, "{}: token file of magic {} with version {}, expected version {}", path, magic, version,
         format->version);
  }
  return *format;
}

}  // namespace

TokenFile::TokenFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
  Descriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) fail(Fault::io, "{}: cannot open: {}", path_, reason());
  struct stat info;
  if (::fstat(file.get(), &info) != 0) fail(Fault::io, "{}: cannot read its size: {}", path_, reason());
  if (S_ISDIR(info.st_mode)) fail(Fault::io, "{}: is a directory, expected a token file", path_);
  if (!S_ISREG(info.st_mode)) fail(Fault::io, "{}: is not a regular file, expected a token file", path_);
  file_bytes_ = info.st_size;
  device_ = info.st_dev;
  inode_ = info.st_ino;
  if (file_bytes_ == 0) fail(Fault::data, "{}: the file is empty (0 bytes), expected a token file", path_);

  std::array<char, kHeaderBytes> header;
  const ssize_t got = ::pread(file.get(), header.data(), header.size(), 0);
  if (got < 0) fail(Fault::io, "{}: cannot read: {}", path_, reason());
  const Format& format = format_of(path_, {header.data(), static_cast<size_t>(got)}, file_bytes_);
  width_ = format.width;
  if (got < kHeaderBytes) {
    fail(Fault::data, "{}: truncated: the header needs {} bytes, the file has {}", path_, kHeaderBytes, got);
  }
  int32_t count = 0;
  std::memcpy(&count, header.data() + 8, 4);
  if (count <= 0) fail(Fault::data, "{}: the header says {} tokens, expected at least 1", path_, count);
  const int64_t expected = kHeaderBytes + count * bytes_of(width_);
  if (file_bytes_ != expected) {
    fail(Fault::data, "{}: {}: the header says {} tokens of {} bytes, so {} bytes, found {}{}", path_,
         file_bytes_ < expected ? "truncated" : "overlong", count, bytes_of(width_), expected, file_bytes_,
         (file_bytes_ - kHeaderBytes) % bytes_of(width_) == 0 ? "" : ", which ends in the middle of a token");
  }
  void* mapped = ::mmap(nullptr, static_cast<size_t>(file_bytes_), PROT_READ, MAP_SHARED, file.get(), 0);
  if (mapped == MAP_FAILED) fail(Fault::io, "{}: cannot map {} bytes: {}", path_, file_bytes_, reason());
  bytes_ = static_cast<const std::byte*>(mapped);
  file_ = file.release();
  count_ = count;
}

TokenFile::TokenFile(TokenFile&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      bytes_(std::exchange(other.bytes_, nullptr)),
      file_bytes_(other.file_bytes_),
      count_(std::exchange(other.count_, 0)),
      width_(other.width_),
      device_(other.device_),
      inode_(other.inode_) {}

TokenFile::~TokenFile() {
  if (bytes_) ::munmap(const_cast<std::byte*>(bytes_), static_cast<size_t>(file_bytes_));
  if (file_ >= 0) ::close(file_);
}

void TokenFile::copy(int64_t from, int64_t n, int32_t* out) const {
  check(from >= 0 && n >= 0 && n <= count_ && from <= count_ - n, "tokens [{}, {} + {}) must lie in {} of {} tokens",
        from, from, n, path_, count_);
  struct stat info;
  if (::fstat(file_, &info) != 0) fail(Fault::io, "{}: cannot read its size: {}", path_, reason());
  if (info.st_size < file_bytes_) {
    fail(Fault::io, "{}: cut short while in use: expected {} bytes, found {}", path_, file_bytes_,
         static_cast<int64_t>(info.st_size));
  }
  const std::byte* tokens = bytes_ + kHeaderBytes;
  if (width_ == TokenWidth::u16) {
    const auto* ids = reinterpret_cast<const uint16_t*>(tokens) + from;
    std::copy(ids, ids + n, out);
  } else {
    std::memcpy(out, tokens + 4 * from, static_cast<size_t>(4 * n));
  }
}

void TokenFile::check_ids(int64_t n, int64_t vocab_size) const {
  constexpr int64_t kBlock = 1 << 16;
  std::vector<int32_t> block(static_cast<size_t>(std::min(n, kBlock)));
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t size = std::min(kBlock, n - from);
    copy(from, size, block.data());
    uint32_t largest = 0;
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, static_cast<uint32_t>(block[i]));
    if (largest < vocab_size) continue;
    int64_t i = 0;
    while (static_cast<uint32_t>(block[i]) < vocab_size) ++i;
    fail(Fault::data, "{}: token {} has id {}, expected ids below the vocabulary size {}", path_, from + i,
         static_cast<uint32_t>(block[i]), vocab_size);
  }
}

TokenWriter::TokenWriter(std::string path, TokenWidth width)
    : path_(std::move(path)), unfinished_(path_ + ".unfinished." + std::to_string(::getpid())), width_(width) {
  Descriptor file(::open(unfinished_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (file.get() < 0) fail(Fault::io, "{}: cannot create: {}", unfinished_, reason());
  file_ = file.release();
  const std::array<int32_t, kHeaderInts> header{};
  write(header.data(), kHeaderBytes);
}

TokenWriter::TokenWriter(TokenWriter&& other) noexcept
    : path_(std::move(other.path_)),
      unfinished_(std::move(other.unfinished_)),
      width_(other.width_),
      file_(std::exchange(other.file_, -1)),
      count_(other.count_) {}

TokenWriter::~TokenWriter() {
  if (file_ < 0) return;
  ::close(file_);
  ::unlink(unfinished_.c_str());
}

void TokenWriter::write(const void* data, int64_t bytes) {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t put = ::write(file_, static_cast<const char*>(data) + done, static_cast<size_t>(bytes - done));
    if (put < 0 && errno != EINTR) fail(Fault::io, "{}: cannot write: {}", path_, reason());
    done += std::max<ssize_t>(put, 0);
  }
}

void TokenWriter::append(std::span<const int32_t> tokens) {
  const auto n = static_cast<int64_t>(tokens.size());
  if (n > std::numeric_limits<int32_t>::max() - count_) {
    fail(Fault::data, "{}: {} tokens, a token file holds at most 2147483647; write several", path_, count_ + n);
  }
  const int32_t largest = width_ == TokenWidth::u16 ? 65535 : std::numeric_limits<int32_t>::max();
  for (int64_t i = 0; i < n; ++i) {
    if (tokens[i] < 0 || tokens[i] > largest) {
      fail(Fault::data, "{}: token {} has id {}, expected 0 to {}", path_, count_ + i, tokens[i], largest);
    }
  }
  if (width_ == TokenWidth::u16) {
    const std::vector<uint16_t> narrow(tokens.begin(), tokens.end());
    write(narrow.data(), 2 * n);
  } else {
    write(tokens.data(), 4 * n);
  }
  count_ += n;
}

void TokenWriter::finish() {
  if (count_ == 0) fail(Fault::data, "{}: no tokens to write", path_);
  const auto& format = width_ == TokenWidth::u16 ? kFormats[0] : kFormats[1];
  const int32_t header[] = {format.magic, format.version, static_cast<int32_t>(count_)};
  if (::pwrite(file_, header, sizeof header, 0) != sizeof header)
    fail(Fault::io, "{}: cannot write: {}", path_, reason());
  if (::fsync(file_) != 0) fail(Fault::io, "{}: cannot flush: {}", path_, reason());
  if (::rename(unfinished_.c_str(), path_.c_str()) != 0) {
    fail(Fault::io, "{}: cannot rename the finished file: {}", path_, reason());
  }
  ::close(std::exchange(file_, -1));
}

void write_token_file(const std::string& path, std::span<const int32_t> tokens, TokenWidth width) {
  TokenWriter writer(path, width);
  writer.append(tokens);
  writer.finish();
}

}  // namespace weft
