"""What a floor is: a simple recommender that a useful model must beat, fitted on the train split.

U users, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Corpus


class LeftOut(Exception):
    """A floor that nobody asked for by name is not measured; the message is the sentence that says why."""


class FittedFloor(Protocol):
    """Scores any histories.

    Attributes:
        notes: sentences for the reader of the results, e.g. which setting was taken.
    """

    notes: list[str]

    def log_probs(self, histories: Sequence[tuple[str, ...]]) -> np.ndarray:
        """float64 [U, I]: ln p(entry) of every entry; a row sums to one after exp.

        Args:
            histories: item ids, oldest first.
        """
        ...


def nothing_lacks(corpus: Corpus) -> str | None:
    return None


@dataclass(frozen=True)
class Floor:
    """One floor; the file that binds it as `FLOOR` gives it its name, a value of `--floors`.

    Attributes:
        fit: (corpus, catalogue, asked) -> the fitted floor. `asked`: the user named it, so it is fitted
            whatever it takes. Otherwise it may raise `LeftOut`. It looks at train and valid only.
        order: floors are shown in this order.
        lacks: says what the data do not have that the floor needs; None where nothing is missing.
    """

    fit: Callable[[Corpus, Catalogue, bool], FittedFloor]
    order: int
    lacks: Callable[[Corpus], str | None] = nothing_lacks
