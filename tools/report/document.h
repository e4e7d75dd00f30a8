// The report as a list of blocks, written once and rendered as Markdown and as one self-contained HTML page.
// Text bears two marks only, `code` and **strong**; what comes from an input file enters through code().
#pragma once
#include <string>
#include <variant>
#include <vector>

namespace weft {

struct Heading {
  int level;
  std::string text;
};
struct Paragraph {
  std::string text;
};
struct Bullets {
  std::vector<std::string> items;
};
struct Table {
  std::vector<std::string> head;  // the first column is a label, the others are numbers
  std::vector<std::vector<std::string>> rows;
};
struct Figure {
  std::string file;  // the SVG's name beside report.md; empty: in the HTML page only
  std::string caption;
  std::string svg;
};
using Block = std::variant<Heading, Paragraph, Bullets, Table, Figure>;
using Document = std::vector<Block>;

// Foreign text as inline code: no control characters, no marks of its own.
std::string code(const std::string& foreign);

std::string escape_html(const std::string& text);

std::string to_markdown(const Document&);
std::string to_html(const Document&, const std::string& title);

}  // namespace weft
