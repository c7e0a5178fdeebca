"""One value for every target token of a split, held as small as the data allow.

A split of tens of millions of windows has hundreds of millions of target tokens, but few different ones: a
title's third token has the same relevance in every sample. So a value is kept once for each token of an entry
(`ByEntry`), once for each user, label or title that a sample has (`BySample`), or once for each place in a
target (`ByPlace`). All are asked like an array over the target tokens of the split: `facts[token_index]`.

Shapes: n samples, N target tokens of the split, E entries.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np

from gdrt_ds.data.prompts import TokenStore

CHUNK = 1 << 18
"""Samples that are looked at at once where all target tokens are wanted."""


class TokenFacts(ABC):
    """Values of target tokens that are read from a table.

    Attributes:
        table: one value for each different case.
        target_offsets: int64[n + 1], which target tokens are whose.
    """

    def __init__(self, table: np.ndarray, store: TokenStore):
        self.table = table
        self.store = store
        self.target_offsets = store.target_offsets

    def __len__(self) -> int:
        """N."""
        return int(self.target_offsets[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.table.dtype

    def __getitem__(self, tokens: np.ndarray | slice) -> np.ndarray:
        """Returns the values of target tokens, by their places in the split's flat array."""
        if isinstance(tokens, slice):
            tokens = np.arange(*tokens.indices(len(self)))
        owner = np.searchsorted(self.target_offsets, tokens, side="right") - 1
        return self.table[self._cases(owner, tokens - self.target_offsets[owner])]

    @abstractmethod
    def _cases(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Where in the table the tokens' values stand.

        Args:
            owner: the sample of each token. place: where in the sample's target it stands.
        """

    @abstractmethod
    def counts(self) -> np.ndarray:
        """int64[table]: target tokens of the split that have each of the values."""

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> TokenFacts:
        """Returns the facts with a changed table of the same length."""
        other = copy.copy(self)
        other.table = change(self.table)
        return other

    def whole(self) -> np.ndarray:
        """[N]: the values of all target tokens."""
        values = np.empty(len(self), dtype=self.dtype)
        for start, stop in self._spans():
            values[start:stop] = self[start:stop]
        return values

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Target tokens of CHUNK samples at a time."""
        num_samples = len(self.target_offsets) - 1
        for first in range(0, num_samples, CHUNK):
            yield (
                int(self.target_offsets[first]),
                int(self.target_offsets[min(num_samples, first + CHUNK)]),
            )


class ByEntry(TokenFacts):
    """Every token of every entry has a value; a sample has the tokens of one entry as its target.

    Args:
        table: [target tokens of all entries].
        offsets: int64[E + 1], which of them are whose.
        entry_of: integers[n], the entry of each sample.
    """

    def __init__(self, table: np.ndarray, store: TokenStore, offsets: np.ndarray, entry_of: np.ndarray):
        super().__init__(table, store)
        self.offsets = offsets
        self.entry_of = entry_of

    def _cases(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        return self.offsets[self.entry_of[owner]] + place

    def counts(self) -> np.ndarray:
        return np.repeat(counted(self.entry_of, len(self.offsets) - 1), np.diff(self.offsets))


class BySample(TokenFacts):
    """All tokens of a sample's target have the same value.

    Args:
        table: [cases].
        case_of: integers[n], the case of each sample.
    """

    def __init__(self, table: np.ndarray, store: TokenStore, case_of: np.ndarray):
        super().__init__(table, store)
        self.case_of = case_of

    def _cases(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        return self.case_of[owner]

    def counts(self) -> np.ndarray:
        return counted(self.case_of, len(self.table), self.store.num_target)


class ByPlace(TokenFacts):
    """Tokens at the same place of their target have the same value.

    Args:
        table: [tokens of the longest target].
    """

    def _cases(self, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
        return place

    def counts(self) -> np.ndarray:
        longer = len(self.store) - np.cumsum(counted(self.store.num_target, len(self.table) + 1))
        return longer[: len(self.table)]


def counted(cases: np.ndarray, num: int, weights: np.ndarray | None = None) -> np.ndarray:
    """int64[num]: how often each case comes, or the sum of its whole-number weights."""
    total = np.zeros(num, dtype=np.int64)
    for start in range(0, len(cases), CHUNK):
        span = slice(start, start + CHUNK)
        own = None if weights is None else weights[span]
        total += np.bincount(cases[span], own, num).astype(np.int64)
    return total


def whole(values: np.ndarray | TokenFacts) -> np.ndarray:
    """Returns the values of all target tokens as an array."""
    if isinstance(values, TokenFacts):
        return values.whole()
    return values


def quantiles(values: np.ndarray | TokenFacts, shares: np.ndarray) -> np.ndarray:
    """float64[shares]: np.quantile of the values of all target tokens, which are not laid out for it."""
    if not isinstance(values, TokenFacts):
        return np.quantile(values, shares)
    counts = values.counts()
    order = np.argsort(values.table, kind="stable")
    ordered = values.table[order]
    reached = np.cumsum(counts[order])
    place = np.asarray(shares) * (reached[-1] - 1)
    below = np.floor(place)
    low = ordered[np.searchsorted(reached, below.astype(np.int64), side="right")]
    above = np.minimum(below.astype(np.int64) + 1, reached[-1] - 1)
    high = ordered[np.searchsorted(reached, above, side="right")]
    # As NumPy interpolates, from the nearer of the two, so that the edges are equal to the bit.
    share = place - below
    step = high - low
    return np.where(share >= 0.5, high - step * (1 - share), low + step * share)


def distinct(values: np.ndarray | TokenFacts) -> int:
    """How many different values the target tokens have."""
    if isinstance(values, TokenFacts):
        values = values.table[values.counts() > 0]
    return len(np.unique(values))


def group_counts(groups: np.ndarray | TokenFacts, num: int) -> np.ndarray:
    """int64[num]: target tokens of each group."""
    if isinstance(groups, TokenFacts):
        counts = groups.counts()
        there = counts > 0  # a title that train never has as a target may have no group
        return counted(groups.table[there], num, counts[there])
    return np.bincount(groups, minlength=num)
