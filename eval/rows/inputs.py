"""Predictions of rows as arrays.

Legend: N rows, G groups of target tokens, T temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.metrics.calibration import TEMPERATURES
from gdrt_ds.errors import UserError

ALL = "all tokens"
"""The one group of an evaluation without groups."""


@dataclass(frozen=True)
class RowInputs:
    """All that metrics of rows read.

    Attributes:
        features: float64[N, G (2 + T)]: summed NLL of each group, its tokens, its NLL at each temperature.
        group_names: of the groups.
        correct: float64[N], 1 where the row's answer has the highest score; NaN without choices.
        choice_nll: float64[N], -ln p(answer among the choices); NaN without choices.
        labels: column -> [N] texts or None.
        user_of_sample: [N] 0..U-1; user_ids: [U].
        sample_ids: [N].
        notes: what the report should say about the predictions.
    """

    features: np.ndarray
    group_names: tuple[str, ...]
    correct: np.ndarray
    choice_nll: np.ndarray
    labels: Mapping[str, np.ndarray]
    user_of_sample: np.ndarray
    user_ids: tuple[str, ...]
    sample_ids: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        return len(self.features)

    @property
    def num_groups(self) -> int:
        return len(self.group_names)

    @property
    def nll(self) -> np.ndarray:
        """float64[N, G]."""
        return self.features[:, : self.num_groups]

    @property
    def tokens(self) -> np.ndarray:
        """float64[N, G]."""
        return self.features[:, self.num_groups : 2 * self.num_groups]


def build_row_inputs(predictions: Sequence[Mapping[str, Any]], group_names: Sequence[str]) -> RowInputs:
    """Turns predictions into arrays.

    Args:
        group_names: of results.json; empty without groups.

    Raises:
        UserError: no predictions.
    """
    if not predictions:
        raise UserError("there are no predictions to evaluate", "evaluate a split that has rows (--split)")
    names = tuple(group_names) or (ALL,)
    num, size = len(predictions), len(names)
    nll = np.zeros((num, size))
    tokens = np.zeros((num, size))
    curves = np.zeros((num, size, TEMPERATURES.size))
    broken = 0
    for place, row in enumerate(predictions):
        values = [part[key] for part in row["groups"].values() for key in ("nll", "nll_at_temperatures")]
        if not all(np.isfinite(np.asarray(value, dtype=np.float64)).all() for value in values):
            broken += 1
            continue
        for group, part in row["groups"].items():
            nll[place, int(group)] = part["nll"]
            tokens[place, int(group)] = part["tokens"]
            curves[place, int(group)] = part["nll_at_temperatures"]
    notes = [f"{broken} of {num} rows have no finite loss; figures are over the others"] if broken else []
    users = {name: place for place, name in enumerate(dict.fromkeys(str(p["user_id"]) for p in predictions))}
    columns = list(dict.fromkeys(name for p in predictions for name in p["labels"]))
    return RowInputs(
        features=np.concatenate([nll, tokens, curves.reshape(num, -1)], axis=1),
        group_names=names,
        correct=np.array([_number(p.get("correct")) for p in predictions]),
        choice_nll=np.array([_number(p.get("choice_nll")) for p in predictions]),
        labels={name: np.array([p["labels"].get(name) for p in predictions], object) for name in columns},
        user_of_sample=np.array([users[str(p["user_id"])] for p in predictions]),
        user_ids=tuple(users),
        sample_ids=tuple(str(p["sample_id"]) for p in predictions),
        notes=tuple(notes),
    )


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
