"""Target tokens to groups: bins of relevance, popularity or length, or any label.

`GroupPlan` is fitted on the train split's token occurrences and applied to any split, so that validation and
evaluation use the same edges and the same labels. It is saved as groups.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from gdrt_ds.config import GroupsSection
from gdrt_ds.data.recommendation import UNKNOWN
from gdrt_ds.data.token_facts import ByPlace, TokenFacts, distinct, group_counts, quantiles, whole
from gdrt_ds.data.training_data import TrainingData
from gdrt_ds.errors import UserError
from gdrt_ds.files import write_text

OTHER = "(other)"
UNSEEN = -1
"""The group of a target token whose label no target of train has, where there is no group "(other)"."""
NUMBERS = {"relevance": "r", "random": "r", "item_popularity": "popularity", "length": "length"}
"""Values of `groups.by` that are numbers, which bins cut into groups -> what the number is called."""


@dataclass
class GroupPlan:
    """How a token finds its group.

    Attributes:
        by: `groups.by`.
        num: G.
        edges: G-1 inner bin edges (relevance, item_popularity, length), ascending; group 0 holds the lowest
            values.
        labels: group labels in order (user_attribute, provider, column, label); the last may be "(other)".
        reference: which model r comes from.
        seed: of the shuffle for by=random.
        counts: train tokens per group.
    """

    by: str
    num: int
    binning: str = ""
    edges: list[float] | None = None
    labels: list[str] | None = None
    reference: str = ""
    column: str | None = None
    seed: int = 0
    counts: list[int] | None = None
    fingerprint: str = ""

    def names(self) -> list[str]:
        """Returns one readable name per group."""
        if self.labels is not None:
            return self.labels
        if self.by == "position":
            names = [f"token {g + 1}" for g in range(self.num)]
            names[-1] += " and later"
            return names
        if self.edges is None:
            return [f"group {g + 1}" for g in range(self.num)]
        cuts = ["-inf", *(f"{edge:.3g}" for edge in self.edges), "inf"]
        what = {"item_popularity": "count"}.get(self.by, NUMBERS[self.by])
        suffix = " (shuffled)" if self.by == "random" else ""
        return [f"{what} in [{low}, {high}){suffix}" for low, high in zip(cuts, cuts[1:])]

    def bin_of(self, values: np.ndarray) -> np.ndarray:
        """int16[...]: the group of each value under `edges`."""
        return np.searchsorted(np.asarray(self.edges), values, side="right").astype(np.int16)

    def save(self, path: Path) -> None:
        """Writes groups.json."""
        text = json.dumps({**asdict(self), "names": self.names()}, indent=1, ensure_ascii=False)
        write_text(path, text)

    @classmethod
    def load(cls, path: Path) -> GroupPlan:
        """Reads what `save` wrote."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        data.pop("names", None)
        return cls(**data)


def bin_edges(values: np.ndarray | TokenFacts, num: int, binning: str) -> list[float]:
    """Returns G-1 inner edges.

    `quantile` gives equal shares of `values`. `uniform` gives equal widths between the 0.1 % and
    99.9 % points.
    """
    if binning == "quantile":
        return [float(edge) for edge in quantiles(values, np.arange(1, num) / num)]
    low, high = quantiles(values, np.array([0.001, 0.999]))
    return [float(edge) for edge in np.linspace(low, high, num + 1)[1:-1]]


class EmptyGroups(UserError):
    """Bins that would hold no token, because too many tokens have equal values."""


def fit_groups(
    section: GroupsSection,
    data: TrainingData,
    relevance: np.ndarray | TokenFacts | None,
    seed: int,
    fingerprint: str = "",
) -> GroupPlan:
    """Decides edges or labels on the train split.

    Args:
        relevance: float32[train target tokens], needed for by=relevance and by=random.

    Raises:
        UserError: there are more groups than distinct values or tokens, all tokens would be in one quantile
        group, or the data lacks a label.
    """
    num_tokens = int(data.stores["train"].target_offsets[-1])
    if section.num > num_tokens:
        raise UserError(
            f"groups.num = {section.num} is more than the {num_tokens} target tokens of train",
            f"set groups.num to at most {num_tokens}",
        )
    plan = GroupPlan(
        by=section.by, num=section.num, column=section.column, seed=seed, fingerprint=fingerprint
    )
    if section.by in NUMBERS:
        plan.binning = section.binning
        if section.by in ("relevance", "random"):
            values = relevance
            plan.reference = section.reference
        else:
            found = data.group_values(section, "train")
            values = found.facts(np.asarray(found.values), data.stores["train"])
        plan.edges = bin_edges(values, section.num, section.binning)
        if len(set(plan.edges)) < len(plan.edges):
            _refuse_empty_bins(section, num_tokens, values)
    elif section.by != "position":
        frequent = data.group_values(section, "train").frequencies().most_common()
        frequent.sort(key=lambda pair: (-pair[1], pair[0]))
        names = [name for name, _ in frequent]
        _refuse_one_label(section, names)
        if OTHER in names:
            raise UserError(
                f"groups.by = {section.by}: the data have a label {OTHER!r}, the name of the group of rare "
                "labels",
                "give that label another name",
            )
        if len(names) > section.num:
            names = [*names[: section.num - 1], OTHER]
        plan.labels = names
        plan.num = len(plan.labels)
    groups = apply_groups(plan, section, data, relevance, "train")
    plan.counts = group_counts(groups, plan.num).tolist()
    if plan.binning == "quantile" and plan.num > 1 and max(plan.counts) == sum(plan.counts):
        # The smallest value is that of nearly all tokens: the edges lie on it, and nothing lies below it.
        _refuse_empty_bins(section, num_tokens, values)
    return plan


def _refuse_empty_bins(section: GroupsSection, num_tokens: int, values: np.ndarray | TokenFacts) -> NoReturn:
    name = NUMBERS[section.by]
    uniform = "" if section.binning == "uniform" else "set groups.binning=uniform, "
    raise EmptyGroups(
        f"groups.num = {section.num} with groups.binning = {section.binning}: some groups would be empty, "
        f"because the {num_tokens} target tokens have only {distinct(values)} distinct values of {name}, or "
        "too many of them have the smallest",
        f"lower groups.num, {uniform}or choose another groups.by",
    )


def _refuse_one_label(section: GroupsSection, names: list[str]) -> None:
    """With one group every objective over groups is the plain mean, which is not what was asked for."""
    if names == [UNKNOWN]:
        raise UserError(
            "groups.by = provider, but no target of train has a provider in the item table",
            "give the item table a column `provider` (data.columns.provider renames another), or choose "
            "another groups.by",
        )
    if len(names) == 1 and section.num > 1:
        what = {"provider": "provider", "label": "the field `group`"}.get(
            section.by, f"groups.column = {section.column}"
        )
        raise UserError(
            f"groups.by = {section.by}: all targets of train have the same label {names[0]!r} of {what}, so "
            "there would be one group",
            "choose a label with at least two values, or another groups.by",
        )


def apply_groups(
    plan: GroupPlan,
    section: GroupsSection,
    data: TrainingData,
    relevance: np.ndarray | TokenFacts | None,
    split: str,
) -> np.ndarray | TokenFacts:
    """Returns the group of every target token of the split, int16; UNSEEN for a label that train lacks."""
    store = data.stores[split]
    if plan.by == "position":
        place = np.arange(int(store.num_target.max(initial=0)))
        return ByPlace(np.minimum(place, plan.num - 1).astype(np.int16), store)
    if plan.edges is not None:
        values = relevance
        if plan.by not in ("relevance", "random"):
            found = data.group_values(section, split)
            values = found.facts(np.asarray(found.values), store)
        if plan.by != "random" and isinstance(values, TokenFacts):
            return values.map(plan.bin_of)
        groups = plan.bin_of(whole(values))
        if plan.by == "random":  # the same sizes, no meaning
            np.random.Generator(np.random.PCG64([plan.seed, len(split), 77])).shuffle(groups)
        return groups
    index = {name: g for g, name in enumerate(plan.labels)}
    other = index.get(OTHER, UNSEEN)
    found = data.group_values(section, split)
    return found.facts(np.array([index.get(value, other) for value in found.values], dtype=np.int16), store)
