// Each pair (a, b) = (x[2i], x[2i+1]) of a head's last R columns becomes (a c - b s, a s + b c), with c and s =
// table[t, 2i] and table[t, 2i+1]; dx is dy turned back: the same with -s. split_rope reads its parts' columns where
// they lie in x, and all parts' gradients go straight into one dx.
#include <algorithm>
#include <array>

#include "engine/cpu/parallel.h"
#include "engine/ops.h"
#if WEFT_CUDA
#include "engine/cuda/vector.h"
#endif

namespace weft {
namespace {

constexpr int kMostParts = 4;

// A part's columns in x, and where they lie apart from it.
struct Place {
  int64_t start, end;
  int64_t width;  // of a head
  int64_t kept;   // columns of a head that are not rotated
  void* data;     // [tokens, end - start]; null: zeros, of a gradient that did not come
};
struct Places {
  int64_t tokens, time, width;  // B*T, T, W of x
  int64_t rotated;              // R
  const float* table;
  void* x;
  int count;
  std::array<Place, kMostParts> parts;

  WEFT_HD const Place& of(int64_t column) const {
    int i = 0;
    while (column >= parts[i].end) ++i;
    return parts[i];
  }
};
enum class Way { apart, together };  // from x to the parts, or from the parts, turned back, to x

// One column of a token.
template <class T, Way kWay>
WEFT_HD void move_element(const Places& places, int64_t token, int64_t column) {
  using A = acc_t<T>;
  const Place& part = places.of(column);
  T* const whole = static_cast<T*>(places.x) + token * places.width + column;
  T* const piece = static_cast<T*>(part.data) + token * (part.end - part.start) + column - part.start;
  const T* const from = kWay == Way::apart ? whole : piece;
  T* const to = kWay == Way::apart ? piece : whole;
  const int64_t turned = (column - part.start) % part.width - part.kept;
  if (!part.data) {
    *to = T(0.0f);
  } else if (turned < 0) {
    *to = *from;
  } else {
    const float* angle = places.table + token % places.time * places.rotated + turned / 2 * 2;
    const A c = angle[0], s = kWay == Way::apart ? angle[1] : -angle[1];
    *to = turned % 2 == 0 ? T(A(from[0]) * c - A(from[1]) * s) : T(A(from[-1]) * s + A(from[0]) * c);
  }
}

template <class T, Way kWay>
void move(Cpu, const Places& places) {
  parallel_for(places.tokens, std::max<int64_t>(1, 4096 / (places.width + 1)), [=](int64_t from, int64_t to) {
    for (int64_t token = from; token < to; ++token)
      for (int64_t column = 0; column < places.width; ++column) move_element<T, kWay>(places, token, column);
  });
}

#if WEFT_CUDA
// A thread moves 8 columns: heads, parts and what is kept of them are whole packs. 22.9 us for [8192, 3 * 768] in bf16
// on an H200, where a plain copy of as much takes 21.1.
constexpr int kN = 8;
template <class T, Way kWay>
__global__ void rope_packs(const __grid_constant__ Places places, unsigned packs) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, token = i / packs, column = i % packs * kN;
  if (token >= places.tokens) return;
  const Place& part = places.of(column);
  T* const whole = static_cast<T*>(places.x) + token * places.width + column;
  T* const piece = static_cast<T*>(part.data) + token * (part.end - part.start) + column - part.start;
  const unsigned turned_from = static_cast<unsigned>(part.kept);
  const unsigned in_head = (column - static_cast<unsigned>(part.start)) % static_cast<unsigned>(part.width);
  Pack<T, kN> pack = {};
  if (part.data) {
    pack = load_pack<kN>(kWay == Way::apart ? whole : piece, kN);
    if (in_head >= turned_from) {
      const float* angles = places.table + token % static_cast<unsigned>(places.time) * places.rotated;
      const auto cs = load_pack<kN>(angles + in_head - turned_from, kN);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        const float a = pack.v[j], b = pack.v[j + 1], c = cs.v[j], s = kWay == Way::apart ? cs.v[j + 1] : -cs.v[j + 1];
        pack.v[j] = T(a * c - b * s);
        pack.v[j + 1] = T(a * s + b * c);
      }
    }
  }
  store_pack(kWay == Way::apart ? piece : whole, pack, kN);
}
template <class T, Way kWay>
__global__ void rope_elements(const __grid_constant__ Places places) {
  const int64_t i = element_index();
  if (i < places.tokens * places.width) move_element<T, kWay>(places, i / places.width, i % places.width);
}
template <class T, Way kWay>
void move(Cuda, const Places& places) {
  bool whole = places.tokens * places.width < int64_t{1} << 32;
  for (int i = 0; i < places.count; ++i) {
    const Place& part = places.parts[i];
    whole = whole && part.start % kN == 0 && part.width % kN == 0 && part.kept % kN == 0;
  }
  if (whole)
    launch_elements(rope_packs<T, kWay>, places.tokens * places.width / kN, places,
                    static_cast<unsigned>(places.width / kN));
  else
    launch_elements(rope_elements<T, kWay>, places.tokens * places.width, places);
}
#endif

template <Way kWay>
void move(const Tensor& x, Places places, const std::vector<Tensor>& parts) {
  places.x = x.raw();
  for (size_t i = 0; i < parts.size(); ++i) places.parts[i].data = parts[i] ? parts[i].raw() : nullptr;
  on_device(x.device(), [&](auto device) {
    dispatch(device, x.dtype(), [&]<class T>() { move<T, kWay>(device, places); });
  });
}

void check_table(const Tensor& x, const Tensor& table) {
  check(table.rank() == 2 && table.dtype() == DType::f32 && table.device() == x.device() &&
            table.size(0) >= x.size(1) && table.size(1) % 2 == 0,
        "rope of {} on {} needs an f32 table [>=T, R even] there, found {} {} on {}", x.shape().str(),
        name_of(x.device()), name_of(table.dtype()), table.shape().str(), name_of(table.device()));
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& table) {
  check(x.rank() == 4, "rope needs x [B, T, H, D], found {}", x.shape().str());
  check_table(x, table);
  const int64_t width = x.size(2) * x.size(3), rotated = table.size(1);
  check(rotated <= x.size(3), "rope's table has {} columns, more than a head of {}", rotated, x.shape().str());
  Places places{x.size(0) * x.size(1), x.size(1), width, rotated, table.data<float>(), nullptr, 1, {}};
  places.parts[0] = {0, width, x.size(3), x.size(3) - rotated, nullptr};
  Tensor y = Tensor::like(x);
  move<Way::apart>(x, places, {y});
  return record("rope", y, {x}, [places, table = table.detached()](const Tensor& dy) -> Gradients {
    const Tensor dx = Tensor::like(dy);
    move<Way::together>(dx, places, {dy});
    return {dx};
  });
}

std::vector<Tensor> split_rope(const Tensor& x, const std::vector<RopePart>& parts, const Tensor& table) {
  check(x.rank() == 3 && !parts.empty() && parts.size() <= kMostParts,
        "split_rope needs x [B, T, W] and 1 to {} parts, found {} and {}", kMostParts, x.shape().str(), parts.size());
  Places places{x.size(0) * x.size(1), x.size(1), x.size(2), 0, nullptr, nullptr, static_cast<int>(parts.size()), {}};
  if (table) {
    check_table(x, table);
    places.rotated = table.size(1);
    places.table = table.data<float>();
  }
  std::vector<Tensor> ys;
  int64_t start = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto [heads, width, rotated] = parts[i];
    check(heads > 0 && width > 0 && (!rotated || (table && places.rotated <= width)),
          "part {} of split_rope has {} heads of {} for a table of {} columns", i, heads, width, places.rotated);
    places.parts[i] = {start, start + heads * width, width, rotated ? width - places.rotated : width, nullptr};
    start += heads * width;
    ys.push_back(Tensor::like(x, {x.size(0), x.size(1), heads, width}));
  }
  check(start == x.size(2), "split_rope's parts have {} columns together, x {}", start, x.shape().str());
  move<Way::apart>(x, places, ys);
  return record_joint("split_rope", ys, {x},
                      [places, table = table.detached(), shape = x.shape(), dtype = x.dtype(),
                       device = x.device()](std::vector<Tensor> dys) -> Gradients {
                        const Tensor dx = Tensor::empty(shape, dtype, device);
                        move<Way::together>(dx, places, dys);
                        return {dx};
                      });
}

}  // namespace weft
