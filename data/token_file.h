// Token files in llm.c's format: a header of 256 little-endian int32 {magic, version, count, 0...}, then `count`
// tokens. Magic 20240520, version 1 holds uint16 tokens; magic 20240801, version 7 holds uint32. Used by Corpus and by
// the tools that write tokens.
#pragma once
#include <cstdint>
#include <span>
#include <string>

namespace weft {

enum class TokenWidth { u16 = 2, u32 = 4 };

// A token file mapped into memory. Opening checks everything that does not need a look at each token: magic, version,
// and that the size is exactly what the count says.
class TokenFile {
 public:
  explicit TokenFile(std::string path);
  ~TokenFile();
  TokenFile(TokenFile&& other) noexcept;
  TokenFile& operator=(TokenFile&&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return count_; }
  TokenWidth width() const { return width_; }
  bool is_same_file(const TokenFile& other) const { return device_ == other.device_ && inode_ == other.inode_; }

  // Tokens [from, from + n) to `out`; an id of 2^31 or more comes out negative. Looks at the file's size first, so
  // that a file cut short while training is an error and not a SIGBUS.
  void copy(int64_t from, int64_t n, int32_t* out) const;

  // Fault::data if one of the first `n` ids is not below `vocab_size`.
  void check_ids(int64_t n, int64_t vocab_size) const;

 private:
  std::string path_;
  int file_ = -1;
  const std::byte* bytes_ = nullptr;
  int64_t file_bytes_ = 0;
  int64_t count_ = 0;
  TokenWidth width_ = TokenWidth::u16;
  uint64_t device_ = 0, inode_ = 0;
};

// Writes a token file piece by piece, in constant memory. The file is whole only after finish(); a writer that goes
// before that removes it.
class TokenWriter {
 public:
  TokenWriter(std::string path, TokenWidth width);
  ~TokenWriter();
  TokenWriter(TokenWriter&& other) noexcept;
  TokenWriter& operator=(TokenWriter&&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return count_; }
  // Fault::data for an id that the width does not hold, and beyond 2^31 - 1 tokens.
  void append(std::span<const int32_t> tokens);
  void finish();

 private:
  void write(const void* data, int64_t bytes);

  std::string path_, unfinished_;
  TokenWidth width_;
  int file_ = -1;
  int64_t count_ = 0;
};

// Writes beside `path` and renames at the end: `path` is never half written.
void write_token_file(const std::string& path, std::span<const int32_t> tokens, TokenWidth width);

}  // namespace weft
