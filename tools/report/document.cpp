#include "tools/report/document.h"

#include <fmt/core.h>

namespace weft {
namespace {

template <class... F>
struct Visitor : F... {
  using F::operator()...;
};
template <class... F>
Visitor(F...) -> Visitor<F...>;

std::string in_cell(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '|') out += '\\';
    out += c;
  }
  return out;
}

std::string markdown_row(const std::vector<std::string>& cells) {
  std::string row = "|";
  for (const std::string& cell : cells) row += fmt::format(" {} |", in_cell(cell));
  return row + "\n";
}

}  // namespace

std::string code(const std::string& foreign) {
  std::string out = "`";
  for (char c : foreign) out += c == '`' ? '\'' : static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  return (out.size() == 1 ? out + " " : out) + "`";
}

std::string to_markdown(const Document& document) {
  std::string out;
  const Visitor render{
      [&](const Heading& h) { out += fmt::format("{:#<{}} {}\n\n", "", h.level, h.text); },
      [&](const Paragraph& p) { out += p.text + "\n\n"; },
      [&](const Bullets& b) {
        for (const std::string& item : b.items) out += fmt::format("- {}\n", item);
        out += "\n";
      },
      [&](const Table& t) {
        out += markdown_row(t.head) + "|---|";
        for (size_t i = 1; i < t.head.size(); ++i) out += "---:|";
        out += "\n";
        for (const auto& row : t.rows) out += markdown_row(row);
        out += "\n";
      },
      [&](const Figure& f) { out += fmt::format("![{}]({})\n\n", f.caption, f.file); },
  };
  for (const Block& block : document) std::visit(render, block);
  while (out.ends_with("\n\n")) out.pop_back();
  return out;
}

}  // namespace weft
