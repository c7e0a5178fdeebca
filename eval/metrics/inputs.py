"""Predictions and catalogue as arrays: checked once here, so that every metric is a few lines of numpy.

Legend: N test samples, U users, I catalogue entries, L labels of items, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import sparse

from gdrt_ds.errors import UserError

# The most popular fifth of the items is the head, the rest the long tail (APLT): common in the field.
HEAD_SHARE = 0.2
POPULARITY = "popularity_"  # labellings by popularity bins are called popularity_<bins>
HISTORY_POPULARITY = "history_popularity_"  # the same by occurrences in train histories (Flower's)


@dataclass(frozen=True, eq=False)
class Labelling:
    """Labels of the catalogue: popularity bins, genres and the like.

    Attributes:
        names: [L] of the labels.
        membership: [I, L], rows sum to 1 (an item with m labels counts 1/m in each).
    """

    names: tuple[str, ...]
    membership: sparse.csr_matrix


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything a metric may look at.

    Attributes:
        item_ids: [I] of the catalogue entries.
        rank: [N] 1-based expected rank. A null or NaN rank (a search whose list ended before the target) is
            the worst rank I, and counted in `missing_rank`.
        missing_rank: [N] whether the prediction has no rank.
        num_tied: [N] items that share the target's score, itself included; 1 where the prediction does not
            say.
        target_nll: [N] nats, NaN where unknown.
        nll_curve: [N, T] the same at each of calibration.TEMPERATURES; [N, 0] without any.
        top: [N, longest list] entry indices, best first, -1 after the end of a short list.
        history: [N, I] CSR counts of the sample's own history.
        target: [N] entry index.
        train_count: [I] interactions in train.
        history_count: [I] occurrences in train histories (GH of MGU and DGU).
        user_of_sample: [N] 0..U-1; user_ids: [U].
        attributes, labels: name -> [N] strings or None, of the user and of the sample.
        relevance_group: [N], -1 where unknown.
        provider_of_item: [I] index into provider_names, -1 without provider.
        item_labels: name -> labelling of the catalogue that the data give, e.g. genres.
        notes: what the report should say about the data.
        lists_are_targets: see `as_targets`.
        cache: what metrics computed and others can use again.
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
    item_labels: Mapping[str, Labelling]
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

    def knows_ranks(self, k: int | None) -> bool:
        """Whether all targets that stand in the top k have a rank; None is the whole catalogue."""
        return not self.missing_rank.any() or (k is not None and k <= self.top.shape[1])

    def exposure(self, k: int) -> sparse.csr_matrix:
        """[N, I] CSR, 1 where the entry is in the sample's top-k list."""

        def make() -> sparse.csr_matrix:
            return self._listed(np.ones(k), k)

        return self.cached(("exposure", k), make)

    def discounted_exposure(self, k: int) -> sparse.csr_matrix:
        """[N, I] CSR, 1 / log2(position + 1) where the entry is in the sample's top-k list."""

        def make() -> sparse.csr_matrix:
            return self._listed(1 / np.log2(np.arange(k) + 2), k)

        return self.cached(("discounted", k), make)

    def labelling(self, name: str) -> Labelling | None:
        """Labels of the catalogue by name; None if the catalogue lacks them.

        Args:
            name: popularity_<bins>, history_popularity_<bins>, or labels that the catalogue holds, such as
                genres.
        """
        counts = counts_of_bins(self, name)
        if counts is None:
            return self.item_labels.get(name)

        def make() -> Labelling:
            return popularity_bins(counts, self.item_ids, int(name.rpartition("_")[2]))

        return self.cached(("labelling", name), make)

    def as_targets(self) -> Inputs:
        """The test targets themselves as lists of one: what a perfect recommender would show."""
        return replace(self, top=self.target[:, None], lists_are_targets=True, cache={})

    def _listed(self, weights: np.ndarray, k: int) -> sparse.csr_matrix:
        top = self.top[:, :k]
        sample, position = np.nonzero(top >= 0)
        return sparse.csr_matrix(
            (weights[position], (sample, top[sample, position])), shape=(self.num_samples, self.num_items)
        )

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, computed once per key."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def counts_of_bins(inputs: Inputs, labelling: str) -> np.ndarray | None:
    """[I] by what the popularity bins of this name are ordered; None if it names no such bins."""
    if labelling.startswith(POPULARITY):
        return inputs.train_count
    if labelling.startswith(HISTORY_POPULARITY):
        return inputs.history_count
    return None


def popularity_order(train_count: np.ndarray, item_ids: Sequence[str]) -> np.ndarray:
    """Entry indices from most to least popular; ties by item id, so the catalogue's order is no matter."""
    return np.lexsort((np.asarray(item_ids), -np.asarray(train_count)))


def popularity_bins(counts: np.ndarray, item_ids: Sequence[str], num_bins: int) -> Labelling:
    """Bins of equal item count over the items that were counted at all, most popular first.

    Items with a count of 0 join the last bin.
    """
    order = popularity_order(counts, item_ids)
    seen = order[np.asarray(counts)[order] > 0]
    bin_of = np.full(len(item_ids), num_bins - 1)
    for index, members in enumerate(np.array_split(seen, num_bins)):
        bin_of[members] = index
    membership = sparse.csr_matrix(
        (np.ones(bin_of.size), (np.arange(bin_of.size), bin_of)), shape=(bin_of.size, num_bins)
    )
    names = [f"{i + 1}" for i in range(num_bins)]
    names[0] = "1 (most)"
    names[-1] = f"{num_bins} (least)"
    return Labelling(tuple(names), membership)


def build_inputs(
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    history_item_counts: Mapping[str, float] | None = None,
) -> Inputs:
    """Checks predictions against the catalogue and turns both into arrays.

    Args:
        predictions: one object per test sample, keys as in predictions.jsonl.
        catalogue_entries: objects with item_id, merged_ids, train_count, provider, groups.
        history_item_counts: item id -> occurrences in train histories. Without it the catalogue's
            train_count stands in, and a note says so.
    Raises:
        UserError: an empty split, an id outside the catalogue, a repeated sample or a rank below 1.
    """
    _check_samples(predictions)
    index_of = _index_of(catalogue_entries)
    notes: list[str] = []
    item_ids = tuple(str(entry.item_id) for entry in catalogue_entries)
    rank, missing, tied = _ranks(predictions, len(item_ids), notes)
    nll = np.array([_number(p.get("target_nll")) for p in predictions])
    unknown = int(np.sum(~np.isfinite(nll)))
    if unknown:
        notes.append(f"{unknown} of {nll.size} samples have no finite target_nll; nll is over the others")
    train_count = np.array([float(entry.train_count) for entry in catalogue_entries])
    if history_item_counts is None:
        history_count = train_count
        notes.append("GH (the history share in MGU and DGU) is taken from the catalogue's train_count")
    else:
        history_count = _history_counts(history_item_counts, index_of, len(item_ids))
    users = _numbered(str(p["user_id"]) for p in predictions)
    providers = _numbered(sorted({str(e.provider) for e in catalogue_entries if e.provider}))
    groups = [p.get("relevance_group") for p in predictions]
    return Inputs(
        item_ids=item_ids,
        rank=rank,
        missing_rank=missing,
        num_tied=tied,
        target_nll=nll,
        nll_curve=_curves(predictions),
        top=_lists(predictions, index_of, notes),
        history=_histories(predictions, index_of, len(item_ids)),
        target=np.array([_lookup(index_of, p["target_id"], "target_id") for p in predictions]),
        train_count=train_count,
        history_count=history_count,
        user_of_sample=np.array([users[str(p["user_id"])] for p in predictions]),
        user_ids=tuple(users),
        attributes=_columns(predictions, "user"),
        labels=_columns(predictions, "labels"),
        relevance_group=np.array([-1 if g is None else int(g) for g in groups]),
        provider_of_item=np.array(
            [providers[str(e.provider)] if e.provider else -1 for e in catalogue_entries]
        ),
        provider_names=tuple(providers),
        item_labels=_item_labels(catalogue_entries),
        notes=tuple(notes),
    )


def _check_samples(predictions: Sequence[Mapping[str, Any]]) -> None:
    if not predictions:
        raise UserError(
            "there are no predictions to evaluate: the split is empty",
            "evaluate a split that has samples (--split)",
        )
    ids = [p.get("sample_id", n) for n, p in enumerate(predictions)]
    repeats = len(ids) - len(set(ids))
    if repeats:
        raise UserError(
            f"sample_id is repeated in the predictions ({repeats} repeats)", "give each test sample once"
        )


def _index_of(catalogue_entries: Sequence[Any]) -> dict[str, int]:
    """Item id (merged ones too) -> index of its catalogue entry."""
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
    return index_of


def _numbered(names: Iterable[str]) -> dict[str, int]:
    """Distinct names in the order of their first appearance -> 0, 1, 2, ..."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _history_counts(
    history_item_counts: Mapping[str, float], index_of: Mapping[str, int], num_items: int
) -> np.ndarray:
    """[I] occurrences in train histories, merged items together."""
    counts = np.zeros(num_items)
    for item_id, count in history_item_counts.items():
        counts[_lookup(index_of, item_id, "history_item_counts")] += count
    return counts


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _curves(predictions: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[N, T] NLL at each temperature; a row of NaN where the prediction has none."""
    found = [p.get("nll_at_temperatures") or () for p in predictions]
    width = max(map(len, found))
    rows = np.full((len(found), width), np.nan)
    for row, values in enumerate(found):
        if len(values) == width:
            rows[row] = [_number(value) for value in values]
    return rows


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
    given = rank[~missing]
    outside = given[(given < 1) | (given > num_items)]
    if outside.size:
        raise UserError(
            f"rank {float(outside[0]):g} is outside 1..{num_items} (the catalogue)",
            "ranks are 1-based; check the scorer and the catalogue",
        )
    if missing.any():
        notes.append(
            f"{int(missing.sum())} of {rank.size} targets have no rank, because they are not in the lists: "
            "they are misses"
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


def _item_labels(catalogue_entries: Sequence[Any]) -> dict[str, Labelling]:
    """The labellings that the catalogue holds, by name.

    Those that no item has, or of which all items share one label, are left out: there is nothing to compare.
    """
    found = {}
    for key in sorted({key for entry in catalogue_entries for key in (entry.groups or {})}):
        labels = [_labels_of(entry, key) for entry in catalogue_entries]
        names = _numbered(sorted({label for values in labels for label in values}))
        if len(names) < 2:
            continue
        rows = [row for row, values in enumerate(labels) for _ in values]
        columns = [names[label] for values in labels for label in values]
        data = [1 / len(values) for values in labels for _ in values]
        membership = sparse.csr_matrix((data, (rows, columns)), shape=(len(labels), len(names)))
        found[key] = Labelling(tuple(names), membership)
    return found


def _labels_of(entry: Any, key: str) -> list[str]:
    """The distinct labels of one catalogue entry; `(none)` where it has none."""
    value = (entry.groups or {}).get(key)
    values = [value] if isinstance(value, str) else list(value or ())
    return [str(label) for label in dict.fromkeys(values) if label] or ["(none)"]
