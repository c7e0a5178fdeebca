"""Predictions and catalogue as arrays: checked once here, so that every metric is a few lines of numpy.

Legend: N test samples, I catalogue entries, L longest list, G groups of items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import sparse

from gdrt_ds.errors import UserError

HEAD_SHARE = 0.2  # the most popular fifth of the items is the head, the rest the long tail (APLT); our choice, common in the field


@dataclass(frozen=True, eq=False)
class ItemGroups:
    """A grouping of the catalogue. membership: [I, G], rows sum to 1 (an item with m labels counts 1/m in each)."""

    names: tuple[str, ...]
    membership: sparse.csr_matrix


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything a metric may look at.

    rank: [N] 1-based expected rank; a null or NaN rank is the worst rank I (and counted in `missing_rank`).
    num_tied: [N] items that share the target's score, itself included; 1 where the prediction does not say.
    target_nll: [N] nats, NaN where unknown. nll_curve: [N, T] the same at each of calibration.TEMPERATURES; [N, 0] without any.
    top: [N, L] entry indices, best first, -1 after the end of a short list.
    history: [N, I] CSR counts of the sample's own history. target: [N] entry index.
    train_count: [I] interactions in train. history_count: [I] occurrences in train histories (GH of MGU and DGU).
    user_of_sample: [N] 0..U-1. attributes, labels: name -> [N] strings or None. relevance_group: [N], -1 where unknown.
    provider_of_item: [I] index into provider_names, -1 without provider.
    """

    item_ids: tuple[str, ...]
    rank: np.ndarray
    missing_rank: np.ndarray
    num_tied: np.ndarray
    target_nll: np.ndarray
    nll_curve: np.ndarray
    top: np.ndarray
    history: sparse.csr_matrix
    target: np.ndarray
    train_count: np.ndarray
    history_count: np.ndarray
    user_of_sample: np.ndarray
    user_ids: tuple[str, ...]
    attributes: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    relevance_group: np.ndarray
    provider_of_item: np.ndarray
    provider_names: tuple[str, ...]
    label_groups: Mapping[str, ItemGroups]
    notes: tuple[str, ...]
    lists_are_targets: bool = False
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.target.size

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def has_lists(self, k: int) -> bool:
        """Whether top-k lists exist: k fits the catalogue and at least one list reaches it."""
        return k <= self.num_items and (self.lists_are_targets or self.top.shape[1] >= k)

    def exposure(self, k: int) -> sparse.csr_matrix:
        """[N, I] CSR, 1 where the entry is in the sample's top-k list."""
        return self.cached(("exposure", k), lambda: self._listed(np.ones(k), k))

    def discounted_exposure(self, k: int) -> sparse.csr_matrix:
        """[N, I] CSR, 1 / log2(position + 1) where the entry is in the sample's top-k list."""
        return self.cached(("discounted", k), lambda: self._listed(1 / np.log2(np.arange(k) + 2), k))

    def groups(self, name: str) -> ItemGroups | None:
        """A grouping by name: popularity_<bins>, or a label of the catalogue such as genres; None if the catalogue lacks it."""
        if name.startswith("popularity_"):
            return self.cached(
                ("groups", name),
                lambda: popularity_groups(self.train_count, self.item_ids, int(name.split("_")[1])),
            )
        return self.label_groups.get(name)

    def as_targets(self) -> Inputs:
        """The test targets themselves as lists of one: what a perfect recommender of the future would show."""
        return replace(self, top=self.target[:, None], lists_are_targets=True, cache={})

    def _listed(self, weights: np.ndarray, k: int) -> sparse.csr_matrix:
        top = self.top[:, :k]
        sample, position = np.nonzero(top >= 0)
        return sparse.csr_matrix(
            (weights[position], (sample, top[sample, position])), shape=(self.num_samples, self.num_items)
        )

    def cached(self, key: Any, make: Any) -> Any:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def popularity_order(train_count: np.ndarray, item_ids: Sequence[str]) -> np.ndarray:
    """Entry indices from most to least popular; ties by item id, so that the catalogue's order does not matter."""
    return np.lexsort((np.asarray(item_ids), -np.asarray(train_count)))


def popularity_groups(train_count: np.ndarray, item_ids: Sequence[str], num_bins: int) -> ItemGroups:
    """Bins of equal item count over the items seen in train, most popular first; items unseen in train join the last bin."""
    order = popularity_order(train_count, item_ids)
    seen = order[np.asarray(train_count)[order] > 0]
    bin_of = np.full(len(item_ids), num_bins - 1)
    for index, members in enumerate(np.array_split(seen, num_bins)):
        bin_of[members] = index
    membership = sparse.csr_matrix(
        (np.ones(bin_of.size), (np.arange(bin_of.size), bin_of)), shape=(bin_of.size, num_bins)
    )
    names = [f"{i + 1}" for i in range(num_bins)]
    names[0], names[-1] = "1 (most)", f"{num_bins} (least)"
    return ItemGroups(tuple(names), membership)


def build_inputs(
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    history_item_counts: Mapping[str, float] | None = None,
) -> Inputs:
    """Check predictions against the catalogue and turn both into arrays.

    predictions: one object per test sample, keys as in predictions.jsonl. catalogue_entries: objects with item_id,
    merged_ids, train_count, provider, groups. history_item_counts: item id -> occurrences in train histories; without it the
    catalogue's train_count stands in, and a note says so.
    Raises UserError for an empty split, an id outside the catalogue, a repeated sample or a rank below 1.
    """
    if not predictions:
        raise UserError(
            "there are no predictions to evaluate: the split is empty",
            "evaluate a split that has samples (--split)",
        )
    if not catalogue_entries:
        raise UserError("the catalogue is empty", "build the catalogue from the item table first")
    index_of: dict[str, int] = {}
    for index, entry in enumerate(catalogue_entries):
        for item_id in {entry.item_id, *(entry.merged_ids or ())}:
            if index_of.setdefault(item_id, index) != index:
                raise UserError(
                    f"item id {item_id!r} is in two catalogue entries",
                    "merge duplicate items once, in the catalogue",
                )
    ids = [p.get("sample_id", n) for n, p in enumerate(predictions)]
    if len(set(ids)) != len(ids):
        raise UserError(
            f"sample_id is repeated in the predictions ({len(ids) - len(set(ids))} repeats)",
            "give each test sample once",
        )
    notes: list[str] = []
    item_ids = tuple(str(entry.item_id) for entry in catalogue_entries)
    rank, missing, tied = _ranks(predictions, len(item_ids), notes)
    nll = np.array([_number(p.get("target_nll")) for p in predictions])
    if 0 < (bad := int(np.sum(~np.isfinite(nll)))):
        notes.append(f"{bad} of {nll.size} samples have no finite target_nll; nll is over the others")
    train_count = np.array([float(entry.train_count) for entry in catalogue_entries])
    if history_item_counts is None:
        history_count = train_count
        notes.append("GH (the history share in MGU and DGU) is taken from the catalogue's train_count")
    else:
        history_count = np.zeros(len(item_ids))
        for item_id, count in history_item_counts.items():
            history_count[_lookup(index_of, item_id, "history_item_counts")] += count
    users = {u: i for i, u in enumerate(dict.fromkeys(str(p["user_id"]) for p in predictions))}
    providers = {
        p: i for i, p in enumerate(sorted({str(e.provider) for e in catalogue_entries if e.provider}))
    }
    groups = [p.get("relevance_group") for p in predictions]
    return Inputs(
        item_ids,
        rank,
        missing,
        tied,
        nll,
        _curves(predictions),
        _lists(predictions, index_of, notes),
        _histories(predictions, index_of, len(item_ids)),
        np.array([_lookup(index_of, p["target_id"], "target_id") for p in predictions]),
        train_count,
        history_count,
        np.array([users[str(p["user_id"])] for p in predictions]),
        tuple(users),
        _columns(predictions, "user"),
        _columns(predictions, "labels"),
        np.array([-1 if g is None else int(g) for g in groups]),
        np.array([providers[str(e.provider)] if e.provider else -1 for e in catalogue_entries]),
        tuple(providers),
        _label_groups(catalogue_entries),
        tuple(notes),
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _curves(predictions: Sequence[Mapping[str, Any]]) -> np.ndarray:
    found = [p.get("nll_at_temperatures") or () for p in predictions]
    width = max(map(len, found))
    return np.array(
        [[_number(v) for v in values] if len(values) == width else [float("nan")] * width for values in found]
    ).reshape(len(found), width)


def _lookup(index_of: Mapping[str, int], item_id: str, where: str) -> int:
    if item_id not in index_of:
        raise UserError(
            f"{where} names item {item_id!r}, which is not in the catalogue",
            "evaluate with the catalogue that scored the items",
        )
    return index_of[item_id]


def _ranks(
    predictions: Sequence[Mapping[str, Any]], num_items: int, notes: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rank = np.array([_number(p.get("rank")) for p in predictions])
    missing = ~np.isfinite(rank)
    if np.any(rank[~missing] < 1) or np.any(rank[~missing] > num_items):
        bad = float(rank[~missing][(rank[~missing] < 1) | (rank[~missing] > num_items)][0])
        raise UserError(
            f"rank {bad:g} is outside 1..{num_items} (the catalogue)",
            "ranks are 1-based; check the scorer and the catalogue",
        )
    if missing.any():
        notes.append(
            f"{int(missing.sum())} of {rank.size} targets have no rank (not found, or NaN scores): counted at the worst rank {num_items}"
        )
    tied = np.array([max(1.0, _number(p.get("num_tied", 1))) for p in predictions])
    tied[missing] = 1.0
    if np.any(rank - (tied - 1) / 2 < 1 - 1e-9):
        raise UserError(
            "num_tied does not fit the expected rank: the first tied position would be below 1",
            "rank must be the mean position of the num_tied items that share the target's score",
        )
    return np.where(missing, float(num_items), rank), missing, tied


def _lists(
    predictions: Sequence[Mapping[str, Any]], index_of: Mapping[str, int], notes: list[str]
) -> np.ndarray:
    lists = [p.get("top_ids") or () for p in predictions]
    length = max(len(ids) for ids in lists)
    top = np.full((len(lists), length), -1)
    for row, ids in enumerate(lists):
        indices = [_lookup(index_of, item_id, "top_ids") for item_id in ids]
        if len(set(indices)) != len(indices):
            raise UserError(
                f"top_ids of sample {row} names an item twice",
                "lists hold each catalogue entry once (merge duplicate ids)",
            )
        top[row, : len(indices)] = indices
    short = int(sum(len(ids) < length for ids in lists))
    if short:
        notes.append(f"{short} of {len(lists)} lists are shorter than the longest one ({length})")
    return top


def _histories(
    predictions: Sequence[Mapping[str, Any]], index_of: Mapping[str, int], num_items: int
) -> sparse.csr_matrix:
    rows, columns = [], []
    for row, p in enumerate(predictions):
        for item_id in p.get("history_ids") or ():
            rows.append(row)
            columns.append(_lookup(index_of, item_id, "history_ids"))
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(predictions), num_items))


def _columns(predictions: Sequence[Mapping[str, Any]], key: str) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(name for p in predictions for name in (p.get(key) or {})))
    columns = {}
    for name in names:
        values = [(p.get(key) or {}).get(name) for p in predictions]
        missing = [v is None or (isinstance(v, float) and math.isnan(v)) for v in values]
        columns[name] = np.array([None if m else str(v) for v, m in zip(values, missing)], dtype=object)
    return columns


def _label_groups(catalogue_entries: Sequence[Any]) -> dict[str, ItemGroups]:
    result = {}
    for key in sorted({key for e in catalogue_entries for key in (e.groups or {})}):
        labels = []
        for e in catalogue_entries:
            value = (e.groups or {}).get(key)
            value = [value] if isinstance(value, str) else list(value or ())
            labels.append([str(v) for v in dict.fromkeys(value) if v] or ["(none)"])
        names = {name: i for i, name in enumerate(sorted({v for values in labels for v in values}))}
        if len(names) < 2:  # no item has this label, or all share one: nothing to compare
            continue
        rows = [r for r, values in enumerate(labels) for _ in values]
        data = [1 / len(values) for values in labels for _ in values]
        columns = [names[v] for values in labels for v in values]
        result[key] = ItemGroups(
            tuple(names), sparse.csr_matrix((data, (rows, columns)), shape=(len(labels), len(names)))
        )
    return result
