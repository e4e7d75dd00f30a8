// For tests that run programs or write files.
#pragma once
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

// A folder of this test's own, gone at the end.
struct Scratch {
  std::filesystem::path path;
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "weft-test-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Scratch() { std::filesystem::remove_all(path); }
  Scratch(const Scratch&) = delete;
  std::string operator/(const std::string& name) const { return (path / name).string(); }
};

struct Answer {
  int code;  // what the shell would say: 128 + the signal for one that was killed
  std::string text;
};

// Runs a shell command; its stdout is the text.
inline Answer run_command(const std::string& command) {
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  Answer answer{0, ""};
  char buffer[4096];
  while (const size_t n = fread(buffer, 1, sizeof buffer, pipe)) answer.text.append(buffer, n);
  const int status = pclose(pipe);
  answer.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return answer;
}
