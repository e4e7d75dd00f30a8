// The file of chosen algorithms: what is kept comes back; a file that is damaged, cut or another machine's does not.
// And products on the GPU that go by it.
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "engine/algorithm_file.h"
#include "engine/ops.h"
#include "tests/scratch.h"
#if WEFT_CUDA
#include "engine/cuda/blas.h"
#endif

using namespace weft;
namespace fs = std::filesystem;

namespace {

AlgorithmFile::Product product(int64_t m) { return {m, -1, INT64_MAX}; }
AlgorithmFile::Algorithm algorithm(uint64_t word) { return {word, UINT64_MAX}; }

std::string content(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

TEST_CASE("choices come back on the same machine and only there") {
  const Scratch scratch;
  const fs::path path = scratch / "new/algorithms.txt";
  {
    AlgorithmFile file(path, "GPU 1");
    CHECK(file.find(product(1)) == nullptr);
    file.keep(product(1), algorithm(7));
    file.keep(product(2), algorithm(8));
    file.keep(product(1), algorithm(9));
  }
  const AlgorithmFile again(path, "GPU 1");
  REQUIRE(again.find(product(1)));
  CHECK(*again.find(product(1)) == algorithm(9));
  CHECK(*again.find(product(2)) == algorithm(8));
  CHECK(again.find(product(3)) == nullptr);
  for (const auto& entry : fs::directory_iterator(path.parent_path())) CHECK(entry.path() == path);  // no draft is left

  AlgorithmFile other(path, "GPU 2");
  CHECK(other.find(product(1)) == nullptr);
  other.keep(product(3), algorithm(1));
  CHECK(AlgorithmFile(path, "GPU 1").find(product(1)) == nullptr);
  CHECK(AlgorithmFile(path, "GPU 2").find(product(3)));
}

TEST_CASE("a damaged file is passed over and replaced") {
  const Scratch scratch;
  const fs::path path = scratch / "damaged.txt";
  AlgorithmFile(path, "GPU").keep(product(1), algorithm(7));
  const std::string whole = content(path);
  std::string flipped = whole;
  flipped[whole.find(" : ") + 10] ^= 1;
  for (const std::string& damaged : {std::string(), std::string("rubbish\n"), whole.substr(0, whole.size() / 2),
                                     whole.substr(0, whole.size() - 1), whole + whole, flipped}) {
    std::ofstream(path, std::ios::binary) << damaged;
    AlgorithmFile file(path, "GPU");
    CHECK(file.find(product(1)) == nullptr);
    file.keep(product(1), algorithm(7));
    CHECK(content(path) == whole);
  }
}

TEST_CASE("a place that cannot be written costs nothing but the file") {
  const Scratch scratch;
  const fs::path path = scratch / "a_file";
  std::ofstream(path) << "x";
  AlgorithmFile file(path / "below" / "algorithms.txt", "GPU");
  file.keep(product(1), algorithm(7));
  CHECK(*file.find(product(1)) == algorithm(7));
}

TEST_CASE("the file's default place is the user's cache folder") {
  const auto with = [](const char* xdg, const char* home) {
    xdg ? setenv("XDG_CACHE_HOME", xdg, 1) : unsetenv("XDG_CACHE_HOME");
    home ? setenv("HOME", home, 1) : unsetenv("HOME");
    return default_algorithm_file("NVIDIA H200 12");
  };
  CHECK(with("/cache", "/home/me") == "/cache/weft/gemm_NVIDIA_H200_12.txt");
  CHECK(with("relative", "/home/me") == "/home/me/.cache/weft/gemm_NVIDIA_H200_12.txt");
  CHECK(with(nullptr, "/home/me") == "/home/me/.cache/weft/gemm_NVIDIA_H200_12.txt");
  CHECK(with(nullptr, nullptr) == "");
}

TEST_SUITE("cuda") {
  TEST_CASE("a product repeats its bits: with the choice that the file hands on, and with the first algorithm") {
#if WEFT_CUDA
    const Scratch scratch;
    const std::string path = scratch / "algorithms.txt";
    const Tensor a = Tensor::empty({640, 768}, DType::bf16, Device::cuda), b = Tensor::like(a, {768, 512});
    fill_normal(a, 1, {1, 1}), fill_normal(b, 1, {1, 2});
    const auto product = [&] {
      std::vector<uint16_t> bits;
      for (const bf16 x : matmul(a, b).to_vector<bf16>()) bits.push_back(x.bits);
      return bits;
    };
    keep_algorithms(path);
    const auto timed = product();
    const std::string kept = content(path);
    CHECK(kept.find(algorithm_machine()) != std::string::npos);
    keep_algorithms(path);  // as the next process would
    CHECK(product() == timed);
    CHECK(content(path) == kept);  // nothing was timed again

    choose_algorithms(AlgorithmChoice::first);
    const auto first = product();
    keep_algorithms("");
    CHECK(product() == first);
    choose_algorithms(AlgorithmChoice::timed);
#endif
  }
}
