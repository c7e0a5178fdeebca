"""report.md and compare.md: the page's sections as GitHub-flavoured Markdown, without the drawings."""

from __future__ import annotations

import re
from typing import Any

from eval.report.page import Page, Section, Table
from eval.report.words import number


def escape(text: Any) -> str:
    """Text that Markdown and HTML both leave alone (titles come from outside)."""
    return re.sub(
        r"([\\`*_{}\[\]#|~$])",
        r"\\\1",
        str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    ).replace("\n", " ")


def _own(text: str) -> str:
    """A paragraph: **bold** lead words stay bold, everything else is escaped."""
    return "".join(
        f"**{escape(part)}**" if n % 2 else escape(part) for n, part in enumerate(text.split("**"))
    )


def render_markdown(page: Page) -> str:
    lines = [f"# {escape(page.title)}", ""]
    lines += [escape(page.subtitle), ""] if page.subtitle else []
    lines += [f"**{escape(page.warning)}**", ""] if page.warning else []
    lines += [" · ".join(f"{escape(k)}: {escape(v)}" for k, v in page.facts), ""]
    for section in page.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section) -> list[str]:
    lines = [f"## {escape(section.title)}", ""]
    for paragraph in section.paragraphs:
        lines += [_own(paragraph), ""]
    if section.cards:
        rows = [
            [
                c.label,
                c.value,
                c.interval,
                ", ".join(f"{n} {number(v)}" for n, v in c.marks[1:]) or "–",
                c.direction,
            ]
            for c in section.cards
        ]
        lines += _table(Table(["metric", "value", "95 % interval", "beside it", "direction"], rows))
    for table in section.tables:
        lines += _table(table)
    for figure in section.figures:
        lines += [f"*Figure in report.html: {escape(figure['title'])}.* {escape(figure['caption'])}", ""]
    for example in section.examples:
        top = "; ".join(("● " if hit else "") + title for title, hit, _ in example["top"])
        lines += [
            f"- **{escape(example['user'])}**, rank {example['rank']}, held out: {escape(example['target'])}",
            f"  - history: {escape('; '.join(example['history']) or '(empty)')}",
            f"  - top 10: {escape(top)}",
        ]
    return [*lines, ""] if section.examples else lines


def _table(table: Table) -> list[str]:
    lines = [escape(table.caption), ""] if table.caption else []
    lines += [
        "| " + " | ".join(escape(c) for c in table.columns) + " |",
        "|" + "|".join("---" if n == 0 else "---:" for n in range(len(table.columns))) + "|",
    ]
    lines += [
        "| " + " | ".join(escape(c if isinstance(c, str) else number(c)) for c in row) + " |"
        for row in table.rows
    ]
    return [*lines, ""]
