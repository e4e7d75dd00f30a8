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

}  // namespace weft
