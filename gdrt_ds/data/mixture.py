"""Several data sets of rows in one run (`data.mixture`): put together with weights, told apart by a label.

Every row gets the label `dataset`, the name of its file or folder. Evaluation breaks down by it, and
`groups.by=column groups.column=dataset` makes groups of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gdrt_ds.config import DataSection
from gdrt_ds.data.corpus import read
from gdrt_ds.data.readers.base import BadRows
from gdrt_ds.data.readers.sft import trained_on
from gdrt_ds.data.text_rows import TextRow, TextRows
from gdrt_ds.errors import UserError

DATASET = "dataset"
"""The label that names where a row comes from."""


def read_mixture(data: DataSection) -> TextRows:
    """Reads every data set of `data.mixture` as if it were `data.path`.

    The weights are about train: 2 takes every row twice, 0.5 a seeded half of the rows. Valid and test keep
    each row once. A row that two data sets share can be held out in one and trained on in the other; a note
    counts such rows.

    Raises:
        UserError: two data sets with the same name, weights that leave no row of train, or whatever a reader
        refuses.
    """
    names = names_of(list(data.mixture))
    splits: dict[str, list[TextRow]] = {}
    notes = []
    sizes = []
    for place, (path, weight) in enumerate(data.mixture.items()):
        name = names[path]
        section = data.model_copy(update={"path": path, "mixture": {}})
        found = read(section, BadRows(skip=data.on_bad_row == "skip"))
        notes += [f"{name}: {line}" for line in found.notes]
        for split, rows in found.splits.items():
            labelled = [_labelled(row, name) for row in rows]
            if split == "train":
                sizes.append(f"{path}: weight {weight:g} of {len(rows)} rows")
                labelled = weighted(labelled, weight, [data.sample_seed, place])
                notes.append(f"{name}: {len(labelled)} rows of train, {len(rows)} at weight {weight:g}")
            splits.setdefault(split, []).extend(labelled)
    if not splits.get("train"):
        raise UserError(
            f"data.mixture leaves no row of train ({'; '.join(sizes)}): a data set gives its rows times its "
            "weight, rounded",
            "raise the weights; 1 takes every row once",
        )
    numbered = {
        split: [replace(row, sample_id=number) for number, row in enumerate(rows)]
        for split, rows in splits.items()
    }
    return TextRows(numbered, [*notes, *trained_on(numbered)])


def names_of(paths: list[str]) -> dict[str, str]:
    """Path -> the name of its file or folder, without its ending.

    Raises:
        UserError: two have the same name.
    """
    names = {path: Path(path).name.split(".")[0] or path for path in paths}
    for path, name in names.items():
        same = [other for other in paths if names[other] == name]
        if len(same) > 1:
            raise UserError(
                f"data.mixture: {' and '.join(same)} have the same name, {name}, so that reports could not "
                f"tell them apart (label `{DATASET}`)",
                f"rename {path}, or give it through a link with another name",
            )
    return names


def weighted(rows: list[TextRow], weight: float, seed: list[int]) -> list[TextRow]:
    """The rows as often as the weight says, whole copies first and then a seeded sample in their order."""
    whole = int(weight)
    rest = round((weight - whole) * len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), size=rest, replace=False)
    return [*rows * whole, *(rows[index] for index in sorted(chosen.tolist()))]


def _labelled(row: TextRow, name: str) -> TextRow:
    """With the data set's name as a label; users of two data sets are not the same."""
    return replace(row, user_id=f"{name}/{row.user_id}", labels={**row.labels, DATASET: name})
