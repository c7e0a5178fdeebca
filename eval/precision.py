"""What the dtype of the training changes in the scores: target losses of a few users in both dtypes.

A run that was trained in bfloat16 is scored in float32 (gdrt_ds/models/float32.py). The difference of the two
says how much of a ranking in bfloat16 would have been rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from eval.scoring import path_scores
from gdrt_ds.data.corpus import Sample
from gdrt_ds.inference.recommender import Recommender, TrainedModel
from gdrt_ds.models.source import dtype_name

NUM_USERS = 8
"""Users that are compared: two passes over a prompt each, seconds of a model that the machine can train."""


@dataclass(frozen=True)
class Precision:
    """Target losses of the same users in the dtype of the training and in that of the scores.

    Attributes:
        trained: dtype of the training.
        scored: dtype of the scores.
        mean_difference_nats: mean over the users of the absolute difference of the target's NLL.
        max_difference_nats: the largest one.
        num_users: users that were compared.
    """

    trained: str
    scored: str
    mean_difference_nats: float
    max_difference_nats: float
    num_users: int

    def line(self) -> str:
        """What a person is told, before the scoring and in the report."""
        return (
            f"scores are computed in {self.scored}, the training in {self.trained}: a target's NLL differs "
            f"by {self.mean_difference_nats:.1e} nats on average, {self.max_difference_nats:.1e} at most "
            f"({self.num_users} users)"
        )

    def figures(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def target_losses(model: TrainedModel | Recommender, samples: Sequence[Sample]) -> np.ndarray:
    """NLL of the target of every sample over the catalogue's tokens, float64 [B], nats."""
    reader = model.reader() if isinstance(model, TrainedModel) else model.reader
    titles = [[model.catalogue.text_of(item) for item in sample.history] for sample in samples]
    entries = [model.catalogue.index_of[sample.target] for sample in samples]
    found = []
    for shown, entry in zip(titles, entries):
        state = reader.read([model.encoder.encode(shown).input_ids.tolist()])
        found.append(-float(path_scores(reader, model.trie, state, [entry], "renormalised")[0]))
    return np.array(found)


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """The users that are compared: evenly over the split."""
    places = np.unique(np.linspace(0, len(samples) - 1, NUM_USERS).round().astype(int))
    return [samples[place] for place in places]


def in_training(trained: TrainedModel, samples: Sequence[Sample]) -> np.ndarray | None:
    """Target losses in the dtype of the training; None where the scores keep it."""
    if not trained.changes_dtype:
        return None
    # Not every operation of a model has float16 on a CPU.
    if trained.loaded.dtype == torch.float16 and next(trained.loaded.model.parameters()).device.type == "cpu":
        return None
    return target_losses(trained, spread(samples))


def compare(
    before: np.ndarray | None, trained: torch.dtype, recommender: Recommender, samples: Sequence[Sample]
) -> Precision | None:
    """The differences of `before` (`in_training`) to the recommender that scores."""
    if before is None or recommender.loaded.dtype == trained:
        return None
    difference = np.abs(target_losses(recommender, spread(samples)) - before)
    return Precision(
        dtype_name(trained),
        dtype_name(recommender.loaded.dtype),
        float(difference.mean()),
        float(difference.max()),
        len(difference),
    )
