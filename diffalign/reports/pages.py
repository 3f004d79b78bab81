"""Pages for the browser, each one file without scripts: the tables of a report, and contact sheets of what went wrong, with the reasons.

Images are linked by their path, so a page belongs beside the images that it shows.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

WORST_PER_TASK = 48
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #212529 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #dee2e6; padding: .35rem .7rem; text-align: left; white-space: nowrap }
td { font-variant-numeric: tabular-nums }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1rem }
figure { margin: 0 } img { width: 100%; height: auto } figcaption { font-size: 13px; overflow-wrap: anywhere }
img.plot { width: auto; max-width: 100% }
.reason { color: #a61e4d; white-space: pre-line }
"""


def report_page(markdown: str, title: str) -> str:
    """A report's Markdown (headings, tables, lists and plots, as `report.markdown` writes it) as a page."""
    blocks = []
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("## "):
            blocks.append(f"<h2>{html.escape(block[3:])}</h2>")
        elif block.startswith("| "):
            blocks.append(_table(lines))
        elif match := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            blocks.append(f'<img class="plot" src="{html.escape(quote(match[2]))}" alt="{html.escape(match[1])}">')
        elif block.startswith("- "):
            blocks.append("<ul>" + "".join(f"<li>{html.escape(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            blocks.append(f"<p>{html.escape(block)}</p>")
    return _page(title, "\n".join(blocks))


def failures_page(rows: Sequence[Mapping[str, Any]], title: str, most: int = WORST_PER_TASK) -> str:
    """What a judge found wrong, task by task: of verdicts the failed images in order, of scores the lowest. At most `most` of each task."""
    parts = []
    for task in dict.fromkeys(row["tag"] for row in rows):
        of_task = [row for row in rows if row["tag"] == task]
        if "correct" in of_task[0]:
            shown = [row for row in of_task if not row["correct"]]
            heading = f"{task}: {len(shown)} of {len(of_task)} images fail"
        else:
            shown = sorted(of_task, key=_first_value)
            heading = f"{task}: the lowest of {len(of_task)} scores"
        more = f", the first {most} shown" if len(shown) > most else ""
        figures = "\n".join(_figure(row) for row in shown[:most])
        parts.append(f'<h2>{html.escape(heading + more)}</h2>\n<div class="sheet">\n{figures}\n</div>')
    return _page(title, "\n".join(parts))


def _figure(row: Mapping[str, Any]) -> str:
    reason = row["reason"] if "reason" in row else f"{_shown(row)} {_detail(row.get('detail', {}))}"
    path = html.escape(quote(row["filename"]))
    caption = f'{html.escape(row["prompt"])}<br><span class="reason">{html.escape(reason)}</span>'
    return f'<figure><a href="{path}"><img src="{path}" loading="lazy" alt=""></a><figcaption>{caption}</figcaption></figure>'


def _first_value(row: Mapping[str, Any]) -> float:
    return next(iter(row["values"].values())) if "values" in row else row["value"]


def _shown(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {v:.4g}" for name, v in row["values"].items()) if "values" in row else f"{row['value']:.4f}"


def _detail(detail: Mapping[str, Any]) -> str:
    """What a score rests on, in brief: answers of BLIP-VQA, parts of 3-in-1, labels found, questions answered no."""
    if "probabilities" in detail:
        return "lowest: " + "; ".join(f"{skill} {p:.2f}" for skill, p in sorted(detail["probabilities"], key=lambda pair: pair[1])[:4])
    if "answers" in detail and all(isinstance(answer, str) for _, answer in detail["answers"]):
        return "no to " + (", ".join(str(number) for number, answer in detail["answers"] if answer != "yes") or "nothing")
    if "answers" in detail:
        return "; ".join(f"{question} {p:.2f}" for question, p in detail["answers"])
    if "objects" in detail:
        return "found " + (", ".join(f"{found[0]} {found[1]:.2f}" for found in detail["objects"][:6]) or "nothing")
    return "; ".join(f"{name} {value}" for name, value in detail.items())


def _table(lines: Sequence[str]) -> str:
    cells = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _page(title: str, body: str) -> str:
    name = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n'
