// Documents out of text files and JSONL, plain, .gz or .zst, in constant memory. Used by tokenize and train_tokenizer.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace weft {

enum class InvalidUtf8 { stop, replace };  // replace: by U+FFFD
enum class BadLine { stop, skip };         // of JSONL

struct TextOptions {
  std::string field = "text";  // of a JSONL line
  int64_t first_chars = 0;     // use only the first characters of each document; 0: all
  // Cut documents at "\n\n": a paragraph joins a document that is empty or keeps within this many characters with it.
  int64_t document_chars = 0;    // 0: do not cut
  int64_t documents = 0;         // stop after this many; 0: all
  int64_t max_line = 256 << 20;  // bytes of a JSONL line, and of a document that cannot be handed on in parts
  bool may_split = true;         // hand a long document on in parts, cut where a letter or digit is followed by a space
  InvalidUtf8 invalid_utf8 = InvalidUtf8::stop;
  BadLine bad_line = BadLine::stop;
};

// A document, or a part of one. Valid UTF-8.
struct TextPart {
  std::string text;
  bool starts_document = true;
  std::string where;  // file, or file:line
};

struct TextSource {
  std::string path;
  int64_t bytes = 0;      // of the file as it lies on the disk
  int64_t documents = 0;  // -1: not known
  std::string hash;       // XXH3 of the file; empty if it was not read to its end
};

class TextInput {
 public:
  // `inputs`: files and folders. A folder stands for the .txt, .text, .md, .jsonl and .ndjson files in it and below
  // (and their .gz and .zst), in the order of their paths.
  TextInput(const std::vector<std::string>& inputs, TextOptions options);

  // Hands each part on, in order, until `take` returns false.
  void read(const std::function<bool(TextPart)>& take);

  const std::vector<TextSource>& sources() const { return sources_; }
  int64_t total_bytes() const { return total_bytes_; }
  int64_t bytes_read() const { return bytes_read_; }
  int64_t bad_lines() const { return bad_lines_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  TextOptions options_;
  std::vector<TextSource> sources_;
  std::vector<std::string> warnings_;
  int64_t total_bytes_ = 0, bad_lines_ = 0;
  std::atomic<int64_t> bytes_read_ = 0;
};

// XXH3 of a file, 16 hexadecimal digits.
std::string hash_file(const std::string& path);

}  // namespace weft
