"""What training needs of a data set, whatever its samples are.

    read_source(config)              -> Source: what was read, before there is a tokenizer
    source.encode(config, tokenizer) -> TrainingData: token stores, groups' values, entries for relevance

Two kinds implement it: windows over a catalogue (recommendation.py), and rows of prompt and completion
(supervised.py). Everything after this file is the same for both. Objectives that compare a target with a
catalogue ask for `TrainingData.catalogue`, which rows do not have.

Shapes: n samples of a split, T tokens of a sample.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gdrt_ds.config import GroupsSection, RunConfig
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.token_facts import ByEntry, BySample, counted


@dataclass(frozen=True)
class Auxiliary:
    """What relevance is scored on: every different (prompt without evidence, target), once.

    Attributes:
        store: one sample per entry; its offsets say which target tokens are whose.
        entry_of: split -> integers[n], the entry of each sample.
        what: what an entry is, in the plural, e.g. `titles`.
        closed: whether training knows all entries, as it knows the titles of a catalogue. Entries of rows
            come from valid and test too, and must not change what is counted on train.
    """

    store: TokenStore
    entry_of: dict[str, np.ndarray]
    what: str
    closed: bool = True

    def known(self) -> np.ndarray:
        """bool[entries]: whether training may know that there is this entry."""
        return (self.train_counts() > 0) | self.closed

    def train_counts(self) -> np.ndarray:
        """int64[entries]: train samples that have this entry."""
        return counted(self.entry_of["train"], len(self.store))

    def facts(self, values: np.ndarray, split: str, store: TokenStore) -> ByEntry:
        """Values of the target tokens of a split, looked up by entry and place.

        Args:
            values: [target tokens of all entries].
            store: the tokenised split.
        """
        return ByEntry(values, store, self.store.target_offsets, self.entry_of[split])

    def per_token(self, values: np.ndarray, split: str, store: TokenStore) -> np.ndarray:
        """[target tokens of the split]: the same as an array."""
        return self.facts(values, split, store).whole()


@dataclass(frozen=True)
class GroupValues:
    """What groups are made of: one value for each run of neighbouring target tokens.

    Attributes:
        values: float64 where `groups.by` is a number, else a list of labels.
        lengths: int64, target tokens of each run; together they are the tokens of the split.
        case_of: where many samples share a value, integers[n]: the value of each sample. Runs are then the
            samples' targets, and there are as many values as different cases.
    """

    values: np.ndarray | list[str]
    lengths: np.ndarray
    case_of: np.ndarray | None = None

    def facts(self, values: np.ndarray, store: TokenStore) -> np.ndarray | BySample:
        """Gives every target token of the split what `values` has for its run."""
        if self.case_of is not None:
            return BySample(values, store, self.case_of)
        return np.repeat(values, self.lengths)

    def frequencies(self) -> Counter:
        """How many runs of the split have each value."""
        if self.case_of is None:
            return Counter(self.values)
        found: Counter = Counter()
        for value, count in zip(self.values, counted(self.case_of, len(self.values)).tolist(), strict=True):
            if count:
                found[value] += count
        return found


class TrainingData(Protocol):
    """A data set as tokens.

    Attributes:
        fingerprint: SHA-256 of the data.
        prompt_fingerprint: SHA-256 of what turns samples into tokens.
        stores: "train" and, where the split is not empty, "valid".
        prefix_length: tokens that all prompts begin with, for shared_prefix.
        catalogue: what can be recommended; None where there is no catalogue.
        notes: lines to announce.
    """

    fingerprint: str
    prompt_fingerprint: str
    stores: dict[str, TokenStore]
    prefix_length: int
    catalogue: Catalogue | None
    notes: list[str]

    def describe(self) -> str:
        """What the targets are chosen among, in a few words, for the plan."""
        ...

    def check(self) -> None:
        """Raises UserError for data from which nothing can be learned."""
        ...

    def auxiliary(self) -> Auxiliary:
        """What relevance is scored on.

        Raises:
            UserError: the data have no prompts without their evidence.
        """
        ...

    def group_values(self, section: GroupsSection, split: str) -> GroupValues:
        """What `groups.by` is about, for every value but relevance, random and position.

        Raises:
            UserError: the data lack it.
        """
        ...

    def target_counts(self) -> np.ndarray:
        """int64[n of train]: how often train has the target of each sample."""
        ...

    def without_evidence(self) -> TokenStore:
        """The train split with prompts that lack their evidence; targets are the same tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what evaluation needs into the run folder."""
        ...


class Source(Protocol):
    """A data set as it was read."""

    def texts(self, config: RunConfig) -> list[str]:
        """All texts, from which the tiny model makes its words."""
        ...

    def encode(self, config: RunConfig, tokenizer: Any) -> TrainingData:
        """Tokenises. Raises UserError for anything about prompts or the tokenizer."""
        ...
