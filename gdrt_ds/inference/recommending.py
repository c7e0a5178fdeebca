"""Histories of titles in, ranked titles out: what `python -m gdrt_ds.recommend` computes.

A history is a list of titles, oldest first. In text, titles are separated by `;`, with or without a space. A
title that the catalogue does not have is used as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdrt_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gdrt_ds.data.catalogue import CatalogueEntry
    from gdrt_ds.inference.recommender import Recommender

SEPARATOR = ";"


def parse_history(text: str, known: Container[str]) -> list[str]:
    """Returns the titles of one line.

    A catalogue title that holds the separator itself is kept whole; the longest match wins.
    """
    parts = text.split(SEPARATOR)
    titles = []
    start = 0
    while start < len(parts):
        title, taken = _longest_title(parts[start:], known)
        if title:
            titles.append(title)
        start += taken
    return titles


def _longest_title(parts: list[str], known: Container[str]) -> tuple[str, int]:
    """(the title that a line begins with, how many parts it takes); an unknown title is the first part."""
    for taken in range(len(parts), 0, -1):
        title = _known_title(parts[:taken], known)
        if title is not None:
            return title, taken
    return parts[0].strip(), 1


def _known_title(parts: list[str], known: Container[str]) -> str | None:
    """The catalogue title that parts of a line are together, as written or with `; ` between them."""
    as_written = SEPARATOR.join(parts).strip()
    spaced = f"{SEPARATOR} ".join(part.strip() for part in parts)
    return next((title for title in (as_written, spaced) if title in known), None)


def read_histories(history: str | None, file: str | None, known: Container[str]) -> list[list[str]]:
    """Returns the histories of --history (one) or --file (one per line).

    Args:
        known: the titles of the catalogue.

    Raises:
        UserError: neither or both are given, the file is unreadable, or a line has no title.
    """
    if (history is None) == (file is None):
        raise UserError(
            "give either --history or --file",
            '--history "title; title; ..." or --file FILE with one history per line',
        )
    if history is not None:
        lines = [("--history", history)]
    else:
        lines = _lines_of(file)
    histories = [parse_history(line, known) for _, line in lines]
    empty = [where for (where, _), titles in zip(lines, histories) if not titles]
    if empty or not histories:
        raise UserError(f"{empty[0] if empty else file}: no title found", "separate titles by `; `")
    return histories


def _lines_of(file: str) -> list[tuple[str, str]]:
    """(where, text) of every line of a file that is not blank."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--file {file}: cannot be read ({error})", "give a UTF-8 text file with one history per line"
        ) from None
    return [
        (f"{file}, line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
    ]


def unknown_titles(histories: Iterable[list[str]], known: set[str]) -> list[str]:
    """Titles that the catalogue does not have, each once, in the order of their appearance."""
    return list(dict.fromkeys(title for titles in histories for title in titles if title not in known))


def recommend(
    recommender: Recommender,
    histories: list[list[str]],
    k: int = 10,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[dict[str, Any]]]:
    """Returns the k most probable titles of the catalogue for every history, with exact scores.

    Args:
        recommender: what `gdrt_ds.open_run` returns.
        histories: titles, oldest first.
        k: length of the lists; a k larger than the catalogue gives all of it.
        batch_size: histories scored at once.
        on_batch: called after every batch with the number of finished and of all histories.

    Returns:
        per history the k best {"rank", "item_id", "title", "log_prob", "probability"}, best first.
    """
    ranker = Ranker(recommender)
    lists = []
    for start in range(0, len(histories), batch_size):
        batch = histories[start : start + batch_size]
        prompts = [recommender.prompt_of_titles(titles) for titles in batch]
        lists += ranker.lists(prompts, [k] * len(prompts))
        if on_batch is not None:
            on_batch(len(lists), len(histories))
    return lists


class Ranker:
    """The exact scorer of a catalogue, made once, and the lists that follow from its scores."""

    def __init__(self, recommender: Recommender):
        # Torch is imported when something is scored: the command's --help and its wrong uses answer at once.
        from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

        self.scorer = CatalogueScorer(recommender.reader, recommender.trie)
        self.entries = recommender.catalogue.entries

    def lists(self, prompts: list[list[int]], sizes: list[int]) -> list[list[dict[str, Any]]]:
        """Returns a list of the asked size for every prompt; all prompts are scored in one batch.

        Every title of the catalogue is scored, so every place of a list is certain.
        """
        scores = self.scorer.score(prompts)
        return [_best(row, self.entries, k) for row, k in zip(scores, sizes, strict=True)]


def _best(log_prob: Tensor, entries: list[CatalogueEntry], k: int) -> list[dict[str, Any]]:
    """The k best entries of one row of scores [I].

    NaN counts as the worst; ties keep the catalogue's order.
    """
    values, places = log_prob.nan_to_num(nan=-float("inf")).sort(descending=True, stable=True)
    found = []
    for rank, (value, place) in enumerate(zip(values[:k].tolist(), places[:k].tolist()), 1):
        entry = entries[place]
        row = {"rank": rank, "item_id": entry.item_id, "title": entry.text}
        if entry.name is not None:
            row["name"] = entry.name
        found.append({**row, "log_prob": value, "probability": math.exp(value)})
    return found


def texts_of_names(titles: list[str], entries: list[CatalogueEntry]) -> list[str]:
    """A history in which names are replaced by the texts that stand for them (`data.item_text`)."""
    text_of = {entry.name: entry.text for entry in entries if entry.name is not None}
    return [text_of.get(title, title) for title in titles]
