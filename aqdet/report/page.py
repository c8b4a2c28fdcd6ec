"""HTML of a report: one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = """
:root { --ink: #1f2328; --soft: #57606a; --line: #d8dee4; --back: #f6f8fa; --mark: #fff4d6; }
* { box-sizing: border-box; }
html { color-scheme: light; scroll-padding-top: 48px; }
body { margin: 0 auto; max-width: 1240px; padding: 0 20px 60px; background: #fff; color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 28px 0 4px; }
h2 { font-size: 18px; margin: 44px 0 8px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 24px 0 6px; }
h4 { font-size: 13px; margin: 18px 0 0; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 960px; }
.soft, figure p { color: var(--soft); }
nav { position: sticky; top: 0; z-index: 1; background: #fff; padding: 8px 0; border-bottom: 1px solid var(--line); }
nav a { margin-right: 18px; color: #0550ae; text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
code, pre { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 4px; padding: 8px 10px; margin: 6px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.notes { border-left: 3px solid #bf8700; background: var(--mark); padding: 6px 12px; margin: 12px 0; }
.notes ul { margin: 4px 0; padding-left: 20px; }
.notes li { overflow-wrap: anywhere; }
.runs span, .legend span { display: inline-flex; align-items: center; margin-right: 18px; }
.runs i, .legend i { display: inline-block; width: 14px; height: 14px; border-radius: 2px; margin-right: 6px; }
.legend i { background: none !important; border: 2px solid; height: 12px; width: 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th:first-child, td:first-child, td.left, th.left { text-align: left; }
th { background: var(--back); font-weight: 600; position: relative; }
tr.apart td { border-top: 2px solid var(--soft); }
td.code, td.path { text-align: left;
  font: 12px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td.code { white-space: normal; overflow-wrap: anywhere; max-width: 420px; }
td.differs, mark { background: var(--mark); color: inherit; }
td small { color: var(--soft); display: inline-block; min-width: 3.2em; }
td.best { font-weight: 600; }
td.best small { font-weight: 400; }
div.grid { display: grid; gap: 14px 22px; margin: 6px 0 10px; }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
@media (max-width: 800px) { .three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.two { grid-template-columns: minmax(0, 1fr); } .many { grid-template-columns: repeat(2,
  minmax(0, 1fr)); } }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 13px; overflow-wrap: anywhere; }
figure p { font-size: 12px; min-height: 1em; margin: 2px 0 0; line-height: 1.4; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--ink); }
.layer svg text { font-size: 11px; }
svg path.grid { stroke: #e4e8ec; fill: none; }
svg path.axis { stroke: #8c959f; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .bars { opacity: .75; }
svg .level { stroke: #1f2328; stroke-width: 1; opacity: .45; fill: none; stroke-dasharray: 2 2; }
svg rect.box { fill: transparent; stroke-width: 2; vector-effect: non-scaling-stroke; }
svg rect.false { stroke-dasharray: 6 3; }
svg rect.missed { stroke-dasharray: 2 3; }
svg text.tag { paint-order: stroke; stroke: #fff; stroke-width: .25em; stroke-linejoin: round; font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
.defs { position: absolute; width: 0; height: 0; }
"""


def escape(text: object) -> str:
    """Text as HTML, also within quotes."""
    return html.escape(str(text), quote=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, row_classes: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already: ``<td ...>`` (``<th ...>``) as it is, or the content of one."""
    head = "".join(cell if cell.startswith("<th") else f"<th>{cell}</th>" for cell in header)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        name = row_classes[index] if row_classes else ""
        lines.append(f'<tr class="{name}">{cells}</tr>' if name else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def chips(names: Sequence[str], colours: Sequence[str], kind: str = "runs") -> str:
    """A legend in one line; ``kind`` ``"runs"`` for filled squares, ``"legend"`` for outlines."""
    items = "".join(
        f'<span><i style="background:{colour};border-color:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, colours, strict=True)
    )
    return f'<div class="{kind}">{items}</div>'


def grid(figures: Sequence[str], columns: int) -> str:
    """Figures in rows of two, three or four."""
    name = {2: "two", 3: "three", 4: "four"}[columns]
    return f'<div class="grid {name}">{"".join(figures)}</div>'


def section(title: str, content: str) -> str:
    """A part with a heading that the navigation leads to; nothing if there is no content."""
    return f'<section id="{anchor(title)}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def anchor(title: str) -> str:
    """Of a section, in the navigation."""
    return title.lower().replace(" ", "-")


def page(title: str, header: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file.

    Args:
        title: of the page.
        header: HTML above the first section.
        sections: title and HTML of each; those without content are left out.
    """
    shown = [(name, content) for name, content in sections if content]
    links = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name, _ in shown)
    body = "".join(section(name, content) for name, content in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{header}<nav>{links}</nav>{body}</body></html>\n"
    )
