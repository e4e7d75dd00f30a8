#include "tools/report/document.h"

#include <fmt/core.h>

#include "tools/report/chart.h"

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

// The two marks of the document's text, as HTML.
std::string inline_html(const std::string& text) {
  const std::string escaped = escape_html(text);
  std::string out;
  bool in_code = false, strong = false;
  for (size_t i = 0; i < escaped.size(); ++i) {
    if (escaped[i] == '`') {
      out += in_code ? "</code>" : "<code>";
      in_code = !in_code;
    } else if (!in_code && escaped.compare(i, 2, "**") == 0) {
      out += strong ? "</strong>" : "<strong>";
      strong = !strong;
      ++i;
    } else {
      out += escaped[i];
    }
  }
  return out;
}

constexpr const char* kPageStyle = R"(:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:14px;margin:.5rem 0 1rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right;font-variant-numeric:tabular-nums}
th{vertical-align:bottom}th:first-child,td:first-child{text-align:left}
code{font-size:.92em}h2{margin-top:2.5rem;border-bottom:2px solid #ddd}h3{margin-top:2rem}
figure{margin:1rem 0;break-inside:avoid}figcaption{font-size:14px}.chart{width:100%;height:auto}
#tip{position:fixed;display:none;pointer-events:none;white-space:pre;font-size:13px;padding:.4rem .6rem;background:#fff;
border:1px solid #999;border-radius:4px}.cursor{stroke:#888}
@media screen and (prefers-color-scheme:dark){body{color:#ddd;background:#16181c}th,td,h2{border-color:#3a3a3a}
#tip{background:#23262b;border-color:#666}}
@media print{body{max-width:none;margin:0}h2,h3{break-after:avoid}tr{break-inside:avoid}}
)";

// Shows, over a line chart, the values at the nearest x.
constexpr const char* kPageScript = R"(const tip=document.getElementById('tip');
for(const group of document.querySelectorAll('.hover')){
  const svg=group.closest('svg'),values=JSON.parse(group.dataset.hover);
  const cursor=document.createElementNS('http://www.w3.org/2000/svg','line');
  cursor.setAttribute('class','cursor');cursor.setAttribute('y1',group.dataset.top);
  cursor.setAttribute('y2',group.dataset.bottom);cursor.style.display='none';group.append(cursor);
  svg.addEventListener('pointermove',event=>{
    const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)*svg.viewBox.baseVal.width/box.width;
    const [at,lines]=values.reduce((a,b)=>Math.abs(b[0]-x)<Math.abs(a[0]-x)?b:a);
    cursor.setAttribute('x1',at);cursor.setAttribute('x2',at);cursor.style.display='';
    tip.textContent=lines.join('\n');tip.style.display='block';
    tip.style.left=Math.min(event.clientX+14,innerWidth-tip.offsetWidth-8)+'px';tip.style.top=event.clientY+14+'px';
  });
  svg.addEventListener('pointerleave',()=>{cursor.style.display='none';tip.style.display='none';});
}
)";

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
      [&](const Figure& f) {
        if (!f.file.empty()) out += fmt::format("![{}]({})\n\n", f.caption, f.file);
      },
  };
  for (const Block& block : document) std::visit(render, block);
  while (out.ends_with("\n\n")) out.pop_back();
  return out;
}

std::string escape_html(const std::string& text) {
  std::string out;
  for (char c : text) switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  return out;
}

std::string to_html(const Document& document, const std::string& title) {
  std::string out = fmt::format(
      "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width\">\n<title>{}</title>\n<style>\n{}{}</style>\n</head>\n<body>\n",
      escape_html(title), kPageStyle, chart_style());
  const auto row = [&](const std::vector<std::string>& cells, const char* tag) {
    out += "<tr>";
    for (const std::string& cell : cells) out += fmt::format("<{0}>{1}</{0}>", tag, inline_html(cell));
    out += "</tr>\n";
  };
  const Visitor render{
      [&](const Heading& h) { out += fmt::format("<h{0}>{1}</h{0}>\n", h.level, inline_html(h.text)); },
      [&](const Paragraph& p) { out += fmt::format("<p>{}</p>\n", inline_html(p.text)); },
      [&](const Bullets& b) {
        out += "<ul>\n";
        for (const std::string& item : b.items) out += fmt::format("<li>{}</li>\n", inline_html(item));
        out += "</ul>\n";
      },
      [&](const Table& t) {
        out += "<div class=\"table\"><table>\n<thead>";
        row(t.head, "th");
        out += "</thead>\n<tbody>\n";
        for (const auto& cells : t.rows) row(cells, "td");
        out += "</tbody>\n</table></div>\n";
      },
      [&](const Figure& f) {
        out += fmt::format("<figure>\n{}<figcaption>{}</figcaption>\n</figure>\n", f.svg, inline_html(f.caption));
      },
  };
  for (const Block& block : document) std::visit(render, block);
  return out + fmt::format("<div id=\"tip\"></div>\n<script>\n{}</script>\n</body>\n</html>\n", kPageScript);
}

}  // namespace weft
