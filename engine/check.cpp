#include "engine/check.h"

namespace weft {

void throw_failed_check(const Located& format, fmt::format_args args) {
  throw Error(Fault::internal, fmt::format("{} ({}:{}, {})", fmt::vformat(format.text, args),
                                           format.where.file_name(), format.where.line(),
                                           format.where.function_name()));
}

void throw_fault(Fault fault, fmt::string_view format, fmt::format_args args) {
  throw Error(fault, fmt::vformat(format, args));
}

int run_program(const char* name, const std::function<int()>& body) {
  try {
    return body();
  } catch (const Error& e) {
    fmt::print(stderr, "{}: {}: {}\n", name, e.fault() == Fault::internal ? "bug" : "error", e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fmt::print(stderr, "{}: bug: {}\n", name, e.what());
    return static_cast<int>(Fault::internal);
  }
}

}  // namespace weft
