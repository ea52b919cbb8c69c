"""HTML pieces of a report: one style sheet, tables, figures with numbered captions, and the page around them. No external resource."""
from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

CSS = """
:root { --ink: #1d1d1f; --soft: #5c5c66; --line: #e2e2e6; --bad: #b3261e; --tint: #f6f6f4; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 Charter, 'Bitstream Charter', Georgia, 'DejaVu Serif', serif; }
main { max-width: 1040px; margin: 0 auto; padding: 44px 32px 80px; }
h1, h2, h3, th, .meta, figcaption, .facts, nav, td, details, .note, svg text {
  font-family: system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif !important; }
h1 { font-size: 28px; font-weight: 650; letter-spacing: -0.015em; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 19px; font-weight: 640; letter-spacing: -0.01em; margin: 48px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; font-weight: 640; margin: 28px 0 6px; }
p { margin: 8px 0 12px; max-width: 78ch; }
.meta { color: var(--soft); font-size: 13.5px; margin: 0 0 22px; }
.summary { background: var(--tint); border-left: 3px solid var(--ink); padding: 14px 22px 8px; margin: 18px 0; }
.summary p { max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0 28px; margin: 22px 0 8px; }
.facts div { border-top: 1px solid var(--line); padding: 8px 0 12px; }
.facts b { display: block; font-size: 20px; font-weight: 600; letter-spacing: -0.01em; }
.facts span { color: var(--soft); font-size: 12.5px; }
.note { font-size: 13.5px; color: var(--soft); }
.alert { color: var(--ink); max-width: none; border-left: 3px solid var(--bad); padding: 6px 16px; margin: 14px 0; background: #fdf4f3; }
figure { margin: 22px 0 30px; }
figure svg { width: 100%; height: auto; display: block; }
figure.narrow svg { max-width: 720px; }
figcaption { font-size: 13.5px; line-height: 1.5; color: var(--soft); margin-top: 8px; max-width: 100ch; }
figcaption b { color: var(--ink); font-weight: 620; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; margin: 10px 0 18px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1.5px solid #9a9aa2; padding: 4px 18px 4px 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 4px 18px 4px 0; vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
th { white-space: nowrap; }
td:first-child { white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
tr.bad td { color: var(--bad); }
tr.chosen td { font-weight: 600; }
summary { cursor: pointer; color: var(--soft); font-size: 13.5px; }
code { font-family: ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace; font-size: 0.88em; }
footer { margin-top: 56px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 640px) { main { padding: 24px 16px 48px; } }
@media print { @page { margin: 16mm; } body { font-size: 11pt; } main { max-width: none; padding: 0; } figure, tr, .summary { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
"""


def escape(text: object) -> str:
    """Text for HTML, with a real minus sign before numbers."""
    return re.sub(r"(?<![\w-])-(?=[\d.])", "\u2212", html.escape(str(text)))


def page(title: str, body: Iterable[str], refresh: int | None = None) -> str:
    """A complete document. refresh: after how many seconds a browser loads it anew."""
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light">\n' + again +
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n" + "\n".join(body)
            + "\n</main>\n</body>\n</html>\n")


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def summary_box(sentences: Sequence[str]) -> str:
    """Sentences of the form "Lead: rest", the lead in bold."""
    parts = []
    for sentence in sentences:
        lead, colon, rest = sentence.partition(": ")
        parts.append(f"<p><b>{escape(lead)}{colon.strip()}</b> {escape(rest)}</p>" if colon else paragraph(sentence))
    return f'<div class="summary">{"".join(parts)}</div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A row of large figures, each with what it is."""
    return '<div class="facts">' + "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in pairs) + "</div>"


def figure(svg: str, number: int, title: str, caption: str, narrow: bool = False) -> str:
    kind = ' class="narrow"' if narrow else ""
    return f"<figure{kind}>{svg}<figcaption><b>Figure {number}. {escape(title)}</b> {escape(caption)}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = (), classes: Sequence[str] = ()) -> str:
    """An HTML table; `numeric`: columns set flush right; `classes`: one per row, "" for none."""
    kinds = [' class="n"' if i in numeric else "" for i in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, header, strict=True))
    body = []
    for i, row in enumerate(rows):
        kind = f' class="{classes[i]}"' if i < len(classes) and classes[i] else ""
        body.append(f"<tr{kind}>" + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def details(label: str, inside: str) -> str:
    return f"<details><summary>{escape(label)}</summary>{inside}</details>"
