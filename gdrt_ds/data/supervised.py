"""Rows of prompt and completion as training data: prompts hold the evidence, completions are the targets.

There is no catalogue. Relevance is scored on the row's auxiliary prompt, the prompt without its evidence:
every different pair of auxiliary prompt and completion is scored once. The pairs of the test split are scored
too, so that evaluation finds the groups of its tokens in the run folder.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import GroupsSection, RunConfig
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import read
from gdrt_ds.data.kept_prompt import row_encoder_of
from gdrt_ds.data.mixture import read_mixture
from gdrt_ds.data.prompts import EncodedPrompt, TokenStore, common_head, store_of
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.data.recommendation import UNKNOWN
from gdrt_ds.data.row_prompts import RowEncoder
from gdrt_ds.data.text_rows import Message, Prompt, TextRow, TextRows
from gdrt_ds.data.training_data import Auxiliary, GroupValues
from gdrt_ds.errors import UserError

SPLITS = ("train", "valid", "test")
TRAINED = ("train", "valid")
"""The splits that training tokenises."""


@dataclass
class SupervisedSource:
    """Rows as they were read."""

    rows: TextRows

    @classmethod
    def read(cls, config: RunConfig) -> SupervisedSource:
        """Reads `data.path`, or the data sets of `data.mixture`.

        Raises:
            UserError: missing file, a bad row, an empty train split.
        """
        if config.data.mixture:
            return cls(read_mixture(config.data))
        bad = BadRows(skip=config.data.on_bad_row == "skip")
        return cls(read(config.data, bad))

    def texts(self, config: RunConfig) -> list[str]:
        """Prompts, completions and choices."""
        found = []
        for split in SPLITS:
            for row in self.rows.splits[split]:
                for prompt in (row.prompt, row.auxiliary or ""):
                    turns = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
                    found += turns
                found += [row.completion, *row.choices]
        return found

    def encode(self, config: RunConfig, tokenizer: Any) -> Supervised:
        """Tokenises train and valid."""
        encoder, kept = row_encoder_of(config, tokenizer)
        data = Supervised.of(self.rows, encoder, config)
        data.notes += kept
        return data


@dataclass
class Supervised:
    """Rows as tokens; see `training_data.TrainingData`.

    Attributes:
        rows: split -> its rows, test among them.
    """

    rows: dict[str, list[TextRow]]
    encoder: RowEncoder
    fingerprint: str
    stores: dict[str, TokenStore] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    catalogue: Catalogue | None = None

    @classmethod
    def of(
        cls, found: TextRows, encoder: RowEncoder, config: RunConfig, splits: Sequence[str] = TRAINED
    ) -> Supervised:
        """Tokenises the given splits.

        Raises:
            UserError: a completion longer than prompt.max_length; prompt.history=mask without auxiliary
                prompts.
        """
        data = cls(found.splits, encoder, _fingerprint(found.splits), notes=list(found.notes))
        if not encoder.chat and isinstance(found.splits["train"][0].prompt, str):
            data.notes.append("prompts are taken as they are (prompt.template=chat makes conversations)")
        for split in splits:
            rows = found.splits[split]
            if not rows:
                if split == "valid":
                    data.notes.append(
                        "no validation split: no early stopping, the last checkpoint is the best"
                    )
                continue
            if split == "train":
                rows = data._controlled(config)
            encoded = [encoder.encode(row) for row in rows]
            data.stores[split] = store_of(encoded)
            data.notes += _cut_note(split, encoded, encoder.max_length)
        return data

    def _controlled(self, config: RunConfig) -> list[TextRow]:
        """The train rows under `prompt.history`: mask takes auxiliary prompts, shuffle another row's."""
        rows = self.rows["train"]
        mode = config.prompt.history
        if mode == "mask":
            return [replace(row, prompt=self.auxiliary_of(row)) for row in rows]
        if mode == "shuffle":
            generator = np.random.Generator(np.random.PCG64([config.train.seed, 4242]))
            order = generator.permutation(len(rows)).tolist()
            return [replace(row, prompt=rows[other].prompt) for row, other in zip(rows, order, strict=True)]
        return rows

    @property
    def prompt_fingerprint(self) -> str:
        return self.encoder.fingerprint

    @cached_property
    def prefix_length(self) -> int:
        """Tokens that all prompts begin with, over all tokenised splits."""
        heads = [store.row(0)[: common_head(store)] for store in self.stores.values()]
        shared = min(map(len, heads))
        for head in heads[1:]:
            differs = np.flatnonzero(head[:shared] != heads[0][:shared])
            if len(differs):
                shared = int(differs[0])
        return shared

    def describe(self) -> str:
        return f"{len({row.completion for row in self.rows['train']}):,} different completions"

    def check(self) -> None:
        """Raises UserError where all completions are the same."""
        if len({row.completion for row in self.rows["train"]}) < 2:
            raise UserError(
                f"all {len(self.rows['train'])} completions of train are the same: "
                f"{self.rows['train'][0].completion[:60]!r}",
                "give rows with at least two different completions",
            )

    # -- prompts without evidence
    def auxiliary_of(self, row: TextRow) -> Prompt:
        """The row's prompt without its evidence.

        A text beside messages stands for the content of the last user turn.

        Raises:
            UserError: the row has none.
        """
        if row.auxiliary is None:
            raise UserError(
                f"row {row.sample_id + 1} of its split has no auxiliary_prompt, the prompt without its "
                "evidence, on which relevance is scored (groups.by = relevance or random, objective cft, "
                "prompt.history = mask)",
                "give every row an auxiliary_prompt, or set groups.by=position, which every row allows; "
                "label, column and length are the other choices. objective=sft uses groups only to report "
                "losses",
            )
        if isinstance(row.auxiliary, str) and not isinstance(row.prompt, str):
            asked = [place for place, turn in enumerate(row.prompt) if turn.role == "user"]
            if not asked:
                raise UserError(
                    f"row {row.sample_id + 1} of its split has no user turn, for whose content its "
                    "auxiliary_prompt would stand",
                    "give auxiliary_prompt as messages too, or add the user's turn",
                )
            last = asked[-1]
            turns = list(row.prompt)
            turns[last] = Message(turns[last].role, row.auxiliary)
            return tuple(turns)
        return row.auxiliary

    def auxiliary(self) -> Auxiliary:
        """Every different pair of auxiliary prompt and completion, in the order of train, valid, test."""
        return self._auxiliary

    @cached_property
    def _auxiliary(self) -> Auxiliary:
        number: dict[tuple[Prompt, str], int] = {}
        encoded = []
        entry_of = {}
        for split in SPLITS:
            entries = []
            for row in self.rows[split]:
                prompt = self.auxiliary_of(row)
                pair = (prompt, row.completion)
                if pair not in number:
                    number[pair] = len(encoded)
                    encoded.append(self.encoder.encode(row, prompt=prompt))
                entries.append(number[pair])
            entry_of[split] = np.array(entries, dtype=np.int64)
        what = "pairs of auxiliary prompt and completion"
        return Auxiliary(store_of(encoded), entry_of, what, closed=False)

    def without_evidence(self) -> TokenStore:
        encoded = [self.encoder.encode(row, prompt=self.auxiliary_of(row)) for row in self.rows["train"]]
        return store_of(encoded)

    # -- groups
    def target_counts(self) -> np.ndarray:
        """Train rows with the same completion."""
        counts = Counter(row.completion for row in self.rows["train"])
        return np.array([counts[row.completion] for row in self.rows["train"]], dtype=np.int64)

    def group_values(self, section: GroupsSection, split: str) -> GroupValues:
        lengths = self.stores[split].num_target
        if section.by == "length":
            return GroupValues(lengths.astype(np.float64), lengths)
        if section.by == "column":
            return GroupValues([self._column(section, row) for row in self.rows[split]], lengths)
        if section.by == "label":
            return self._labels(split)
        raise UserError(
            f"groups.by = {section.by} is about items and users of interactions, and these data are rows of "
            "prompt and completion",
            "set groups.by to relevance, label, column, position, length or random",
        )

    def _column(self, section: GroupsSection, row: TextRow) -> str:
        if section.column not in row.labels:
            raise UserError(
                f"groups.column = {section.column!r}: row {row.sample_id + 1} of its split has no such "
                "column",
                f"available: {', '.join(sorted(row.labels)) or 'none'}",
            )
        return row.labels[section.column]

    def _labels(self, split: str) -> GroupValues:
        """The field `group`: one run for each row with one label, runs of equal labels for spans."""
        if all(row.group is None for row in self.rows["train"]):
            raise UserError(
                "groups.by = label, but no row of train has the field `group`",
                "give rows a `group` (data.columns.group names another column), or choose another groups.by",
            )
        values: list[str] = []
        lengths: list[int] = []
        for row, num_target in zip(self.rows[split], self.stores[split].num_target.tolist(), strict=True):
            if row.group is None or isinstance(row.group, str):
                values.append(row.group or UNKNOWN)
                lengths.append(num_target)
                continue
            labels = self.encoder.token_labels(row)
            assert len(labels) == num_target
            starts = [0, *(place for place in range(1, num_target) if labels[place] != labels[place - 1])]
            values += [labels[start] for start in starts]
            lengths += np.diff([*starts, num_target]).tolist()
        return GroupValues(values, np.array(lengths, dtype=np.int64))

    def save(self, folder: Path) -> None:
        """Writes prompt.json."""
        self.encoder.save(folder / "prompt.json")


def _cut_note(split: str, encoded: list[EncodedPrompt], max_length: int) -> list[str]:
    cut = [one.num_dropped for one in encoded if one.num_dropped]
    if not cut:
        return []
    return [
        f"{split}: {len(cut)} of {len(encoded)} rows exceed prompt.max_length={max_length}: the first "
        f"{sum(cut)} tokens of their prompts are left out"
    ]


def _fingerprint(splits: dict[str, list[TextRow]]) -> str:
    """SHA-256 of all rows."""
    digest = hashlib.sha256()
    for name in SPLITS:
        for row in splits[name]:
            digest.update(f"{name}\x1f{row!r}\x1e".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
