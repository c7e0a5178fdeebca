"""One HTML page that holds everything, styles and figures included.

It runs no script and asks no network, and every text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from eval.report.page import Card, Page, Section, Table
from eval.report.plots import draw
from eval.report.words import number

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def render_html(page: Page) -> str:
    counter = [0]
    facts = "".join(f"<span><b>{escape(k)}</b> {escape(v)}</span>" for k, v in page.facts)
    warning = f'<p class="warning">{escape(page.warning)}</p>' if page.warning else ""
    contents = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in page.sections)
    body = "".join(_section(section, counter) for section in page.sections)
    title = escape(f"{page.title}: {page.subtitle}" if page.subtitle else page.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="kicker">{escape(page.title)}</p><h1>{escape(page.subtitle or page.title)}</h1>'
        f'{warning}<p class="facts">{facts}</p>'
        f"<nav>{contents}</nav></header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _own(text: str) -> str:
    """A paragraph: **bold** lead words, everything escaped."""
    return "".join(
        f"<b>{escape(part)}</b>" if n % 2 else escape(part) for n, part in enumerate(text.split("**"))
    )


def _section(section: Section, counter: list[int]) -> str:
    parts = [f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>']
    parts += [f'<p class="lead">{_own(p)}</p>' for p in section.paragraphs]
    if section.cards:
        parts.append('<div class="cards">' + "".join(_card(card) for card in section.cards) + "</div>")
    if section.figures:
        parts.append(
            '<div class="figures">' + "".join(_figure(f, counter) for f in section.figures) + "</div>"
        )
    tables = "".join(_table(t) for t in section.tables)
    if tables and section.folded:
        rows = sum(len(t.rows) for t in section.tables)
        noun = "Tables" if len(section.tables) > 1 else "Table"
        tables = f"<details><summary>{noun} with all {rows} rows</summary>{tables}</details>"
    parts.append(tables)
    if section.examples:
        parts.append('<div class="examples">' + "".join(_example(e) for e in section.examples) + "</div>")
    return "".join(parts) + "</section>\n"


def _card(card: Card) -> str:
    """Value, interval, and a strip with the run (dot, interval) and the floors (ticks) on one scale."""
    numbers = [v for _, v in card.marks] + [v for v in (card.low, card.high) if v is not None]
    low = min(0.0, min(numbers))
    high = max(numbers) * 1.04 or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    strip = ""
    if card.low is not None and card.high is not None:
        strip += f'<i class="span" style="left:{place(card.low)};right:calc(100% - {place(card.high)})"></i>'
    strip += "".join(
        f'<i class="tick t{n % 4}" style="left:{place(v)}"></i>' for n, (_, v) in enumerate(card.marks[1:], 1)
    )
    strip += f'<i class="dot" style="left:{place(card.marks[0][1])}"></i>'
    beside = "".join(
        f'<li><i class="key t{n % 4}"></i>{escape(name)} <b>{number(v)}</b></li>'
        for n, (name, v) in enumerate(card.marks[1:], 1)
    )
    return (
        f'<div class="card"><h3>{escape(card.label)}</h3><p class="value">{escape(card.value)}</p>'
        f'<p class="interval">{escape(card.interval)}</p>'
        f'<div class="strip">{strip}</div><ul>{beside}</ul>'
        f'<p class="meaning">{escape(card.meaning)}; {escape(card.direction)}</p></div>'
    )


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    numeric = [all(_is_number(row[c]) for row in table.rows) for c in range(len(table.columns))]
    head = "".join(
        f"<th{_class(numeric[c] and c)}>{escape(str(name))}</th>" for c, name in enumerate(table.columns)
    )
    rows = []
    for row in table.rows:
        cells = [
            f"<td{_class(numeric[c] and c, v)}>{escape(v if isinstance(v, str) else number(v))}</td>"
            for c, v in enumerate(row)
        ]
        cells[0] = cells[0].replace("<td", '<th scope="row"', 1).replace("</td>", "</th>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{caption}{body}</table></div>'


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) or bool(
        re.fullmatch(r"[-–+]?[\d,.]*(e-?\d+)?( %)?( to [-–+]?[\d,.e-]+)?( \(.*\))?", value)
    )


def _class(numeric: Any, value: Any = "") -> str:
    if numeric:
        return ' class="n"'
    return ' class="text"' if len(str(value)) > 24 else ""


def _figure(figure: Mapping[str, Any], counter: list[int]) -> str:
    counter[0] += 1
    wide = figure["kind"] == "tokens"
    drawing = _tokens(figure) if wide else draw(figure, counter[0])
    opening = '<figure class="wide">' if wide else "<figure>"
    title = f"<h3>{escape(figure['title'])}</h3>"
    caption = f"<figcaption>{escape(figure['caption'])}</figcaption>"
    return f"{opening}{title}{drawing}{caption}</figure>"


def _tokens(figure: Mapping[str, Any]) -> str:
    """Prompts as coloured text.

    Target tokens are coloured by group, input tokens by attribution; segments have their own underline.
    """
    num_groups = figure.get("num_groups") or 1 + max(
        (t.get("group") or 0 for p in figure["prompts"] for t in p["tokens"]), default=0
    )
    prompts = []
    for prompt in figure["prompts"]:
        largest = (
            max((abs(t["weight"]) for t in prompt["tokens"] if t.get("weight") is not None), default=0) or 1
        )
        spans = "".join(_token(t, largest, num_groups) for t in prompt["tokens"])
        title = f"<h4>{escape(str(prompt['title']))}</h4>" if prompt.get("title") else ""
        prompts.append(f'{title}<p class="tokens">{spans}</p>')
    groups = "".join(
        f'<span style="{_mixed(f"--g{_ramp(g, num_groups)}", 55)}">{g}</span>' for g in range(num_groups)
    )
    has_group = any(t.get("group") is not None for p in figure["prompts"] for t in p["tokens"])
    has_weight = any(t.get("weight") is not None for p in figure["prompts"] for t in p["tokens"])
    legend = "".join(
        f'<span class="seg {s}">{s}</span>' for s in ("instruction", "template", "history", "target")
    )
    if has_group:
        legend += f'<span class="scale">group {groups}</span>'
    if has_weight:
        signs = '<span class="cool">lowers</span><span class="warm">raises</span>'
        legend += f'<span class="scale">attribution {signs}</span>'
    return f'<p class="legend">{legend}</p>' + "".join(prompts)


def _mixed(variable: str, percent: int) -> str:
    """CSS: a background in one of the page's colours, thinned to `percent`."""
    return f"background:color-mix(in srgb, var({variable}) {percent}%, transparent)"


def _ramp(group: int, num_groups: int) -> int:
    """The place of a group on the page's ramp of eight colours."""
    return round(group * 7 / max(1, num_groups - 1))


def _token(token: Mapping[str, Any], largest: float, num_groups: int) -> str:
    style = ""
    hint = token["segment"]
    if token.get("group") is not None:
        style = _mixed(f"--g{_ramp(int(token['group']), num_groups)}", 55)
        hint += f", group {int(token['group'])}"
    elif token.get("weight") is not None:
        strength = round(70 * abs(token["weight"]) / largest)
        style = _mixed("--warm" if token["weight"] >= 0 else "--cool", strength)
    if token.get("weight") is not None:
        hint += f", attribution {token['weight']:.3g}"
    text = escape(str(token["text"])).replace("\n", "↵<br>")
    styled = f' style="{style}"' if style else ""
    return f'<span class="seg {token["segment"]}" title="{escape(hint, quote=True)}"{styled}>{text}</span>'


def _example(example: Mapping[str, Any]) -> str:
    top = "".join(
        f'<li class="{"hit" if hit else "seen" if seen else ""}">{escape(title)}</li>'
        for title, hit, seen in example["top"]
    )
    history = "".join(f"<li>{escape(title)}</li>" for title in example["history"]) or "<li>(empty)</li>"
    return (
        f"<article><h3>{escape(example['user'])} <small>rank {escape(example['rank'])}</small></h3>"
        f"<p>held out: <b>{escape(example['target'])}</b></p>"
        f'<div class="lists"><div><h4>history, oldest first</h4><ul>{history}</ul></div>'
        f"<div><h4>top 10</h4><ol>{top}</ol></div></div></article>"
    )
