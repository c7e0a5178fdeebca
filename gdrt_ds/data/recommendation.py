"""Windows over a catalogue as training data: a history is the evidence, a title is the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import GroupsSection, RunConfig, block_samples
from gdrt_ds.data.catalogue import Catalogue, CatalogueEntry
from gdrt_ds.data.coded_windows import CodedWindows
from gdrt_ds.data.columns import WindowTable
from gdrt_ds.data.corpus import Corpus, Sample, load_corpus
from gdrt_ds.data.growing import GrowingStore, stitch
from gdrt_ds.data.kept_prompt import template_of
from gdrt_ds.data.prompts import PromptEncoder, TokenStore, store_of
from gdrt_ds.data.templates import PromptTemplate, template_texts
from gdrt_ds.data.training_data import Auxiliary, GroupValues
from gdrt_ds.data.window_store import tokenise_split
from gdrt_ds.errors import UserError

UNKNOWN = "(unknown)"
"""The label of a sample whose item has no provider."""


@dataclass
class RecommendationSource:
    """A corpus with its catalogue."""

    corpus: Corpus
    catalogue: Catalogue

    @classmethod
    def read(cls, config: RunConfig) -> RecommendationSource:
        """Reads `data.path`. Raises what `load_corpus` raises."""
        corpus = load_corpus(config.data)
        return cls(corpus, Catalogue.build(corpus))

    def texts(self, config: RunConfig) -> list[str]:
        """The template's texts and the titles."""
        titles = [entry.text for entry in self.catalogue.entries]
        return [*template_texts(config.prompt, self.corpus.domain), *titles]

    def encode(self, config: RunConfig, tokenizer: Any) -> Recommendation:
        """Tokenises train and valid."""
        corpus, catalogue = self.corpus, self.catalogue
        template, kept = template_of(config, corpus.domain, tokenizer)
        encoder = PromptEncoder(template, tokenizer, config.prompt.max_length)
        data = Recommendation(corpus, catalogue, template, encoder)
        data.notes += [*corpus.notes, *catalogue.notes(), *kept]
        for split in ("train", "valid"):
            if split == "valid" and not corpus.splits.get("valid"):
                data.notes.append("no validation split: no early stopping, the last checkpoint is the best")
                continue
            windows = data.windows(split)
            key = f"{corpus.fingerprint} {split}"
            if split == "train":
                windows = windows.controlled(config.prompt.history, config.train.seed)
                key += f" {config.prompt.history} {config.train.seed}"
            data.stores[split], lines = tokenise_split(encoder, catalogue, windows, key)
            data.notes += [f"{split}: {line}" for line in lines]
            if split == "train" and config.data.windows == "growing":
                samples = control_history(corpus.split(split), config.prompt.history, config.train.seed)
                data.stores[split], line = _growing(config, data, samples)
                data.notes.append(line)
        return data


def control_history(samples: Sequence[Sample], mode: str, seed: int) -> Sequence[Sample]:
    """Applies a training control as `CodedWindows.controlled` does, to samples."""
    if mode == "keep":
        return samples
    if mode == "mask":
        return [replace(s, history=()) for s in samples]
    order = np.random.Generator(np.random.PCG64([seed, 4242])).permutation(len(samples))
    return [replace(s, history=samples[other].history) for s, other in zip(samples, order)]


def _growing(config: RunConfig, data: Recommendation, samples: Sequence[Sample]) -> tuple[GrowingStore, str]:
    """The train split with windows that grow, and the line to announce."""
    section = config.data
    block = block_samples(config)
    windows = stitch(samples, block, section.min_history, config.train.seed)
    line = (
        f"train: windows grow: {len(samples):,} targets in {len(windows.runs):,} runs, blocks of {block} "
        f"targets, histories of {section.min_history} to {section.min_history + block - 1} items"
    )
    store = GrowingStore(data.stores["train"], windows, data.encoder, data.catalogue)
    return store, line


@dataclass
class Recommendation:
    """A corpus as tokens; see `training_data.TrainingData`."""

    corpus: Corpus
    catalogue: Catalogue
    template: PromptTemplate
    encoder: PromptEncoder
    stores: dict[str, TokenStore] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _windows: dict[str, CodedWindows] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def prompt_fingerprint(self) -> str:
        return self.template.fingerprint

    @property
    def prefix_length(self) -> int:
        """Everything before the first history token."""
        return len(self.encoder.prefix_ids)

    def describe(self) -> str:
        return f"{len(self.catalogue):,} titles"

    def check(self) -> None:
        """Raises UserError for a catalogue of one title, and for titles that are the same tokens."""
        num_titles = len(self.catalogue)
        if num_titles < 2:
            raise UserError(
                f"the catalogue has {num_titles} title, so there is nothing to choose between: "
                f"{self.catalogue.entries[0].text!r}",
                "give an item table with at least two titles (data.items, data.path)",
            )
        self._refuse_titles_alike()

    def _refuse_titles_alike(self) -> None:
        """A tokenizer may write two titles alike, e.g. where it normalises Unicode.

        No model can tell them apart. They can have no trie either, so no evaluation and no masked softmax.
        """
        first: dict[tuple[int, ...], CatalogueEntry] = {}
        alike = []
        for entry in self.catalogue.entries:
            earlier = first.setdefault(tuple(self.encoder.target_ids(entry.text)), entry)
            if earlier is not entry:
                alike.append((earlier, entry))
        if not alike:
            return
        one, other = [f"{entry.text!r} (item {entry.item_id})" for entry in alike[0]]
        raise UserError(
            f"catalogue titles {one} and {other} are the same tokens for this tokenizer, so no model could "
            f"tell them apart (pairs like this: {len(alike)})",
            "write both titles in the same characters, so that they are one entry of the catalogue, or make "
            "them differ; or choose another tokenizer (model.tokenizer)",
        )

    def auxiliary(self) -> Auxiliary:
        """One history-free sample per catalogue entry: without the history, prompts are all the same."""
        return self._auxiliary

    @cached_property
    def _auxiliary(self) -> Auxiliary:
        texts = [entry.text for entry in self.catalogue.entries]
        store = store_of([self.encoder.encode([], text, mask_history=True) for text in texts])
        return Auxiliary(store, {split: self.targets(split) for split in self.stores}, "titles")

    def windows(self, split: str) -> CodedWindows:
        """The windows of a split with catalogue entries for items, histories as the data have them."""
        if split not in self._windows:
            self._windows[split] = CodedWindows.of(self.corpus.split(split), self.catalogue)
        return self._windows[split]

    def targets(self, split: str) -> np.ndarray:
        """int32[n]: the catalogue entry that each sample has as its target."""
        return self.windows(split).targets

    def target_counts(self) -> np.ndarray:
        counts = np.array([entry.train_count for entry in self.catalogue.entries])
        return counts[self.targets("train")]

    def group_values(self, section: GroupsSection, split: str) -> GroupValues:
        lengths = self.stores[split].num_target
        entries = self.catalogue.entries
        if section.by == "item_popularity":
            counts = np.array([entry.train_count for entry in entries], dtype=np.float64)
            return GroupValues(counts, lengths, self.targets(split))
        if section.by == "length":
            return GroupValues(np.arange(lengths.max() + 1, dtype=np.float64), lengths, lengths)
        if section.by == "provider":
            names = [str(entry.provider or UNKNOWN) for entry in entries]
            return GroupValues(names, lengths, self.targets(split))
        if section.by == "label":
            raise UserError(
                "groups.by = label: windows over a catalogue have no labels of their own",
                "set groups.by=column with groups.column, or give rows with a `group` (data.format=sft)",
            )
        samples = self.corpus.splits[split]
        if section.by == "user_attribute" and isinstance(samples, WindowTable):
            users, case_of = np.unique(samples.users, return_inverse=True)
            names = samples.events.user_names
            labels = [self._attribute(section, names[user]) for user in users.tolist()]
            return GroupValues(labels, lengths, case_of)
        return GroupValues([self._label(section, sample) for sample in samples], lengths)

    def _attribute(self, section: GroupsSection, user_id: str) -> str:
        user = self.corpus.users.get(user_id, {})
        if section.column not in user:
            raise UserError(
                f"groups.column = {section.column!r}: user {user_id} has no such attribute",
                f"available: {', '.join(sorted(user)) or 'none (the data set has no user table)'}",
            )
        return str(user[section.column])

    def _label(self, section: GroupsSection, sample: Sample) -> str:
        if section.by == "user_attribute":
            return self._attribute(section, sample.user_id)
        if section.column not in sample.labels:
            raise UserError(
                f"groups.column = {section.column!r}: sample {sample.sample_id} has no such label",
                f"available: {', '.join(sorted(sample.labels)) or 'none'}",
            )
        return str(sample.labels[section.column])

    def without_evidence(self) -> TokenStore:
        windows = self.windows("train").without_histories()
        key = f"{self.corpus.fingerprint} without evidence"
        return tokenise_split(self.encoder, self.catalogue, windows, key)[0]

    def save(self, folder: Path) -> None:
        """Writes catalogue.jsonl and prompt.json."""
        self.catalogue.save(folder / "catalogue.jsonl")
        self.template.save(folder / "prompt.json")
