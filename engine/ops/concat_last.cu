// y[r] = [a[r], b[r / share]] for the rows r of the matrices that the leading axes make; share is a's number of heads
// where b has one head for all of them, else 1.
// da[r] = the first columns of dy[r]; db[s] = sum over the rows r of s of the last columns of dy[r], in order.
#include "engine/ops.h"
#include "engine/ops/columns.h"

namespace weft {
namespace {

// db [rows, width]: each row sums `share` rows of dy [rows * share, pitch], columns from `at` on.
struct SharedSum {
  int64_t width, pitch, at, share;
  template <class T>
  WEFT_HD T operator()(const T* dy, int64_t i) const {
    const T* from = dy + i / width * share * pitch + at + i % width;
    acc_t<T> total = 0;
    for (int64_t s = 0; s < share; ++s) total += static_cast<acc_t<T>>(from[s * pitch]);
    return T(total);
  }
};

template <class T>
void sum_shared(Cpu, int64_t n, SharedSum f, const T* dy, T* db) {
  parallel_for(n, 1024, [=](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) db[i] = f(dy, i);
  });
}
#if WEFT_CUDA
template <class T>
__global__ void sum_shared_kernel(int64_t n, SharedSum f, const T* dy, T* db) {
  if (const int64_t i = element_index(); i < n) db[i] = f(dy, i);
}
template <class T>
void sum_shared(Cuda, int64_t n, SharedSum f, const T* dy, T* db) {
  launch_elements(sum_shared_kernel<T>, n, n, f, dy, db);
}
#endif

}  // namespace

Tensor concat_last(const Tensor& a, const Tensor& b) {
  check(a.dtype() == b.dtype() && a.device() == b.device() && a.rank() >= 1 && a.rank() == b.rank(),
        "concat_last needs two tensors of one dtype and rank, found {} {} and {} {}", name_of(a.dtype()),
        a.shape().str(), name_of(b.dtype()), b.shape().str());
  int64_t share = 1;
  for (int i = 0; i + 1 < a.rank(); ++i) {
    if (i + 2 == a.rank() && b.size(i) == 1) share = a.size(i);
    check(a.size(i) == b.size(i) || (i + 2 == a.rank() && b.size(i) == 1),
          "concat_last needs equal leading axes (the heads of the second may be 1), found {} and {}", a.shape().str(),
          b.shape().str());
  }
  Shape shape = a.shape();
  shape.set(-1, a.size(-1) + b.size(-1));
  const int64_t rows = shape.rows(), da_width = a.size(-1), db_width = b.size(-1), item = size_of(a.dtype());
  const int64_t pitch = shape[-1] * item;
  Tensor y = Tensor::like(a, shape);
  char* const to = static_cast<char*>(y.raw());
  on_device(a.device(), [&](auto device) {
    copy_columns(device, rows, da_width * item, {to, pitch}, {static_cast<char*>(a.raw()), da_width * item});
    copy_columns(device, rows, db_width * item, {to + da_width * item, pitch},
                 {static_cast<char*>(b.raw()), db_width * item}, share);
  });
  return record("concat_last", y, {a, b}, [rows, da_width, db_width, item, pitch, share, a_shape = a.shape(),
                                           b_shape = b.shape()](const Tensor& dy) -> Gradients {
    Tensor da = Tensor::like(dy, a_shape), db = Tensor::like(dy, b_shape);
    char* const from = static_cast<char*>(dy.raw());
    on_device(dy.device(), [&](auto device) {
      copy_columns(device, rows, da_width * item, {static_cast<char*>(da.raw()), da_width * item}, {from, pitch});
      if (share == 1)
        copy_columns(device, rows, db_width * item, {static_cast<char*>(db.raw()), db_width * item},
                     {from + da_width * item, pitch});
      else
        dispatch(device, dy.dtype(), [&]<class T>() {
          sum_shared(device, db.numel(), SharedSum{db_width, da_width + db_width, da_width, share}, dy.data<T>(),
                     db.data<T>());
        });
    });
    return {da, db};
  });
}

}  // namespace weft
