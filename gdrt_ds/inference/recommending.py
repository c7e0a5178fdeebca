"""Histories of titles in, ranked titles out: what `python -m gdrt_ds.recommend` computes.

A history is a list of titles, oldest first. In text, titles are separated by `;`, with or without a space. A
title that the catalogue does not have is used as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdrt_ds.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gdrt_ds.config import RunConfig
    from gdrt_ds.data.catalogue import CatalogueEntry
    from gdrt_ds.inference.recommender import Recommender

SEPARATOR = ";"
MAX_NAMED = 3  # texts of items that share a name


def parse_history(text: str, known: Collection[str] | KnownTitles) -> list[str]:
    """Returns the titles of one line.

    A catalogue title that holds the separator itself is kept whole; the longest match wins.
    """
    return _titles_of(text, known, most_parts(known))


def most_parts(known: Collection[str] | KnownTitles) -> int:
    """Returns how many parts of a line the longest known title takes: its separators and one."""
    if isinstance(known, KnownTitles):
        return known.most_parts
    return 1 + max((title.count(SEPARATOR) for title in known), default=0)


def _titles_of(text: str, known: Container[str], most: int) -> list[str]:
    parts = text.split(SEPARATOR)
    titles = []
    start = 0
    while start < len(parts):
        title, taken = _longest_title(parts[start : start + most], known)
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


def read_histories(
    history: str | None, file: str | None, known: Collection[str] | KnownTitles
) -> list[list[str]]:
    """Returns the histories of --history (one) or --file (one per line).

    Args:
        known: the titles of the catalogue.

    Raises:
        UserError: neither or both are given, the file is unreadable, or a line has no title.
    """
    return histories_of(history_lines(history, file), known)


def history_lines(history: str | None, file: str | None) -> list[tuple[str, str]]:
    """(where, text) of --history, or of every line of --file. A file is read once: it may be a pipe.

    Raises:
        UserError: neither or both are given, or the file is unreadable or has no line.
    """
    if (history is None) == (file is None):
        raise UserError(
            "give either --history or --file",
            '--history "title; title; ..." or --file FILE with one history per line',
        )
    lines = [("--history", history)] if history is not None else _lines_of(str(file))
    if not lines:
        raise UserError(f"--file {file}: no title found", "write one history per line")
    return lines


def histories_of(lines: list[tuple[str, str]], known: Collection[str] | KnownTitles) -> list[list[str]]:
    """The titles of every line of `history_lines`.

    Raises:
        UserError: a line has no title.
    """
    most = most_parts(known)
    histories = [_titles_of(line, known, most) for _, line in lines]
    for (where, _), titles in zip(lines, histories):
        if not titles:
            raise UserError(f"{where}: no title found", "separate titles by `; `")
    return histories


def _lines_of(file: str) -> list[tuple[str, str]]:
    """(where, text) of every line of a file that is not blank."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--file {file}: cannot be read ({error})", "give a UTF-8 text file with one history per line"
        ) from None
    # A title may hold characters that `splitlines` takes for the end of a line.
    lines = enumerate(text.split("\n"), 1)
    return [(f"{file}, line {number}", line) for number, line in lines if line.strip()]


def unknown_titles(histories: Iterable[list[str]], known: set[str]) -> list[str]:
    """Titles that the catalogue does not have, each once, in the order of their appearance."""
    return list(dict.fromkeys(title for titles in histories for title in titles if title not in known))


def cut_note(config: RunConfig, dropped: list[int]) -> str:
    """Says once that histories are cut, as in training.

    Args:
        dropped: titles that each history loses.
    """
    cut = sum(number > 0 for number in dropped)
    return (
        f"note: {cut} of {len(dropped)} histories lose their oldest titles, {sum(dropped)} in all: as in "
        f"training, the newest data.history_length={config.data.history_length} are used, as far as they fit "
        f"into prompt.max_length={config.prompt.max_length}"
    )


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
        histories: titles, oldest first; the newest `data.history_length` of each are used, as in training.
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


class NoScores(UserError):
    """The model gives no ranking for a history: its scores are NaN."""


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

        Raises:
            NoScores: the score of a title is NaN.
        """
        scores = self.scorer.score(prompts)
        broken = scores.isnan()
        if bool(broken.any()):
            raise NoScores(
                f"the model gives NaN for {int(broken.sum())} of {broken.numel()} scores, so nothing can be "
                "ranked",
                "use an earlier checkpoint of the run, or score in float32 (model.dtype=float32)",
            )
        return [_best(row, self.entries, k) for row, k in zip(scores, sizes, strict=True)]


def _best(log_prob: Tensor, entries: list[CatalogueEntry], k: int) -> list[dict[str, Any]]:
    """The k best entries of one row of scores [I]; ties keep the catalogue's order."""
    values, places = log_prob.sort(descending=True, stable=True)
    found = []
    for rank, (value, place) in enumerate(zip(values[:k].tolist(), places[:k].tolist()), 1):
        entry = entries[place]
        row = {"rank": rank, "item_id": entry.item_id, "title": entry.text}
        if entry.name is not None:
            row["name"] = entry.name
        found.append({**row, "log_prob": value, "probability": math.exp(value)})
    return found


class KnownTitles:
    """What items may be called in a history: their texts, and with `data.item_text` also their names.

    Items that share a text are one entry with a merged name, `Heat (1995) / Alien (1979)`. The whole name
    stands for the entry, and so does the name of each item. A text goes before a name, and a whole name
    before a part of a merged one.

    Attributes:
        texts: of all entries.
        most_parts: parts of a line that the longest text or name takes (`most_parts`).
    """

    def __init__(self, entries: Iterable[CatalogueEntry]):
        from gdrt_ds.data.catalogue import NAME_SEPARATOR  # late: numpy comes with it

        self.texts: set[str] = set()
        self._separator = NAME_SEPARATOR
        self._whole: dict[str, list[CatalogueEntry]] = {}
        self._merged: dict[str, list[CatalogueEntry]] = {}  # by every piece of a merged name
        for entry in entries:
            self.texts.add(entry.text)
            if entry.name is None:
                continue
            self._whole.setdefault(entry.name, []).append(entry)
            if len(entry.merged_ids) > 1:
                for piece in dict.fromkeys(entry.name.split(NAME_SEPARATOR)):
                    self._merged.setdefault(piece, []).append(entry)
        self.most_parts = max(most_parts(self.texts), most_parts(self._whole))

    def __contains__(self, title: object) -> bool:
        return isinstance(title, str) and (title in self.texts or bool(self._named(title)))

    def texts_of(self, history: Iterable[str]) -> list[str]:
        """The history with the texts that its names stand for; an unknown title stays as it is.

        Raises:
            UserError: a name that items with different texts have.
        """
        return [self._text_of(title) for title in history]

    def _text_of(self, title: str) -> str:
        if title in self.texts:
            return title
        texts = [entry.text for entry in self._named(title)]
        if len(texts) > 1:
            raise UserError(
                f"the history has the name {title!r}, and {len(texts)} items with different texts have it",
                f"give the text of the one that is meant: {', '.join(map(repr, texts[:MAX_NAMED]))}",
            )
        return texts[0] if texts else title

    def _named(self, title: str) -> list[CatalogueEntry]:
        """The entries with this name, else those whose merged name has it among others."""
        if title in self._whole:
            return self._whole[title]
        # The name of one item may hold the separator itself, so whole pieces of the merged name are compared.
        wanted = f"{self._separator}{title}{self._separator}"
        candidates = self._merged.get(title.split(self._separator)[0], [])
        return [entry for entry in candidates if wanted in f"{self._separator}{entry.name}{self._separator}"]


def texts_of_names(titles: list[str], entries: Iterable[CatalogueEntry]) -> list[str]:
    """A history in which names are replaced by the texts that stand for them; see `KnownTitles`.

    Raises:
        UserError: a name that items with different texts have.
    """
    return KnownTitles(entries).texts_of(titles)
