"""What a page consists of. HTML and Markdown are both rendered from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """A table; cells are text or numbers, and the first column names the row."""

    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""
    first_is_label: bool = True


@dataclass
class Card:
    """One headline figure: text ready to print, and numbers for the strip under it."""

    label: str
    value: str
    interval: str
    meaning: str
    direction: str
    marks: list[tuple[str, float]]  # (name, value): the run first, then floors
    low: float | None = None
    high: float | None = None


@dataclass
class Section:
    """A part of the page under one heading. In paragraphs, **two stars** make lead words bold."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    folded: bool = False  # long tables start closed on the page


@dataclass
class Page:
    """A whole page; `facts` are (name, value) pairs under its title."""

    title: str
    subtitle: str
    warning: str
    facts: list[tuple[str, str]]
    sections: list[Section]
