#include "tools/bench_step/recorder.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "train/device_info.h"
#if WEFT_CUPTI
#include <cupti.h>
#include <cxxabi.h>

#include <cstdlib>
#include <unordered_map>
#endif

namespace weft {
namespace {

// Takes the observer away again, also when the step throws.
struct Observing {
  explicit Observing(WorkObserver observer) { observe_work(std::move(observer)); }
  ~Observing() { observe_work({}); }
};

std::vector<Item> record_on_cpu(const std::function<void()>& step) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto now = [&] { return std::chrono::duration<double, std::milli>(Clock::now() - start).count(); };
  std::vector<Item> items;
  double before = now();
  const auto close = [&](Owner owner) {
    const double at = now();
    items.push_back({kOnCpu, before, at, std::move(owner)});
    before = now();
  };
  const Observing observing([&](const char* name, const Shape& output, Work work) { close({name, output, work}); });
  step();
  return items;
}

#if WEFT_CUPTI
void cupti_check(CUptiResult status, const char* what) {
  if (status == CUPTI_SUCCESS) return;
  const char* words = "";
  cuptiGetResultString(status, &words);
  fail(Fault::device, "CUPTI: {} failed: {}", what, words);
}

struct Activity {
  std::string name;
  uint64_t start, end;
  uint32_t call;  // the API call that queued it
};
std::vector<Activity> activities;
std::unordered_map<uint32_t, uint64_t> segment_of_call;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *size = 8 << 20;
  *max_records = 0;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* k = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
      activities.push_back({k->name, k->start, k->end, k->correlationId});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
      activities.push_back({"copy", m->start, m->end, m->correlationId});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const auto* m = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
      activities.push_back({"fill", m->start, m->end, m->correlationId});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION) {
      const auto* e = reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(record);
      segment_of_call[e->correlationId] = e->externalId;
    }
  }
  std::free(buffer);
}

// "void weft::(anonymous namespace)::f<int>(float*, long)" -> "f<int>".
std::string shortened(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  for (const char* part : {"(anonymous namespace)::", "weft::", "__nv_bfloat16"})
    for (size_t at; (at = name.find(part)) != std::string::npos;)
      name.replace(at, std::string(part).size(), std::string(part).starts_with("__nv") ? "bf16" : "");
  if (name.starts_with("void ")) name.erase(0, 5);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION, CUPTI_ACTIVITY_KIND_RUNTIME,
                                         CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};
constexpr auto kExternal = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;

struct Collecting {
  Collecting() {
    static const bool registered = [] {
      cupti_check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "registering");
      return true;
    }();
    static_cast<void>(registered);
    activities.clear(), segment_of_call.clear();
    for (const CUpti_ActivityKind kind : kKinds) cupti_check(cuptiActivityEnable(kind), "enabling an activity");
  }
  ~Collecting() {
    for (const CUpti_ActivityKind kind : kKinds) cuptiActivityDisable(kind);
  }
};

// What was collected, in order of start; owners by segment, where the call that queued an item was in one.
std::vector<Item> collected(const std::vector<Owner>& owners) {
  wait_for(Device::cuda);
  cupti_check(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "flushing");
  std::sort(activities.begin(), activities.end(), [](const Activity& a, const Activity& b) { return a.start < b.start; });
  std::vector<Item> items;
  std::map<std::string, std::string> names;
  for (const Activity& a : activities) {
    std::string& name = names[a.name];
    if (name.empty()) name = shortened(a.name);
    const auto at = segment_of_call.find(a.call);
    const bool owned = at != segment_of_call.end() && at->second < owners.size();
    const auto ms = [&](uint64_t t) { return static_cast<double>(t - activities.front().start) * 1e-6; };
    items.push_back({name, ms(a.start), ms(a.end), owned ? owners[at->second] : Owner{}});
  }
  return items;
}

std::vector<Item> record_on_gpu(const std::function<void()>& step) {
  wait_for(Device::cuda);
  const Collecting collecting;
  std::vector<Owner> owners;
  const auto open = [&] {
    cupti_check(cuptiActivityPushExternalCorrelationId(kExternal, owners.size()), "opening a segment");
  };
  const auto close = [&](Owner owner) {
    uint64_t last = 0;
    cupti_check(cuptiActivityPopExternalCorrelationId(kExternal, &last), "closing a segment");
    owners.push_back(std::move(owner));
    open();
  };
  open();
  {
    const Observing observing([&](const char* name, const Shape& output, Work work) { close({name, output, work}); });
    step();
  }
  uint64_t last = 0;
  cupti_check(cuptiActivityPopExternalCorrelationId(kExternal, &last), "closing a segment");
  return collected(owners);
}
#endif

}  // namespace

std::string recording_problem([[maybe_unused]] Device device) {
#if !WEFT_CUPTI
  if (device == Device::cuda) return "the time of each kernel needs CUPTI, which this build was configured without";
#endif
  return "";
}

std::vector<Item> record_items([[maybe_unused]] Device device, const std::function<void()>& step) {
#if WEFT_CUPTI
  if (device == Device::cuda) return record_on_gpu(step);
#endif
  return record_on_cpu(step);
}

std::vector<Item> record_replay([[maybe_unused]] const std::vector<Item>& eager,
                                [[maybe_unused]] const std::function<void()>& step) {
#if WEFT_CUPTI
  std::map<std::string, std::vector<const Owner*>> owners;
  for (const Item& item : eager) owners[item.name].push_back(&item.owner);
  wait_for(Device::cuda);
  const Collecting collecting;
  step();
  std::vector<Item> items = collected({});
  std::map<std::string, size_t> seen;
  for (Item& item : items)
    if (const std::vector<const Owner*>& same = owners[item.name]; seen[item.name] < same.size())
      item.owner = *same[seen[item.name]++];
  return items;
#else
  return {};
#endif
}

double busy_time(const std::vector<Item>& items) {
  double busy = 0, until = 0;
  for (const Item& item : items) {
    busy += std::max(0.0, item.end - std::max(item.start, until));
    until = std::max(until, item.end);
  }
  return busy;
}

}  // namespace weft
