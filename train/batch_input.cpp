#include "train/batch_input.h"

#include <algorithm>
#include <cstring>

#include "engine/allocator.h"

namespace weft {
namespace {

constexpr int64_t kHeader = 4;  // i32 elements before the tokens: 16 bytes, which keep them aligned

Tensor make_storage(int64_t ids, Device device) {
  const MemoryScope scope(Category::data, "batch");
  return Tensor::zeros({kHeader + 2 * ids}, DType::i32, device);
}

}  // namespace

BatchInput::BatchInput(int64_t batch, int64_t seq, Device device)
    : storage_(make_storage(batch * seq, device)),
      tokens_(storage_.rows(kHeader, kHeader + batch * seq).view({batch, seq})),
      targets_(storage_.rows(kHeader + batch * seq, kHeader + 2 * batch * seq).view({batch, seq})) {
  for (int i = 0; i < (device == Device::cpu ? 1 : kSlots); ++i)
    slots_.push_back({Staging(storage_.bytes(), device), Mark(device)});
}

void BatchInput::queue(const Batch& batch, uint64_t step) {
  check(static_cast<int64_t>(batch.tokens.size()) == tokens_.numel() && batch.targets.size() == batch.tokens.size(),
        "a batch of {} tokens in the place of {}", batch.tokens.size(), tokens_.shape().str());
  Slot& slot = slots_[next_++ % slots_.size()];
  slot.copied.wait();
  int32_t* const ids = slot.memory.at<int32_t>();
  std::memcpy(ids, &step, sizeof step);
  std::copy(batch.tokens.begin(), batch.tokens.end(), ids + kHeader);
  std::copy(batch.targets.begin(), batch.targets.end(), ids + kHeader + tokens_.numel());
  queue_copy(storage_.raw(), ids, storage_.bytes(), storage_.device());
  slot.copied.set();
}

}  // namespace weft
