"""Floors: simple recommenders that every model is shown beside. A file here is one floor.

    popularity    the most popular items of train
    markov        what followed the last item in train
    sasrec        a transformer over item ids, tuned on the valid split

All give probabilities over the whole catalogue, so every metric, target NLL included, is computed for them as
for a model, with the same rules for ties. _beside.py has the paired differences.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.floors._beside import minus_floors
from eval.floors.base import FittedFloor, Floor, LeftOut
from eval.loading import Subject
from eval.metrics.calibration import nll_curve
from eval.predictions import describe
from eval.scoring.ranking import expected_rank, num_tied, top_entries
from gdrt_ds.data.corpus import Corpus
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.registry import parts

__all__ = [
    "AUTO",
    "Choice",
    "FittedFloor",
    "Floor",
    "LeftOut",
    "choose",
    "fit_floors",
    "floor_predictions",
    "minus_floors",
]

AUTO = "auto"
NONE = "none"

BATCH = 64
"""Users whose scores over the catalogue are held together."""

Choice = dict[str, bool]
"""Name of a floor -> whether the user asked for it by name, in the order in which floors are shown."""


def all_floors() -> dict[str, Floor]:
    """Every floor by its name, in the order in which they are shown."""
    found = parts("eval.floors", "FLOOR")
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def choose(text: str, corpus: Corpus) -> Choice:
    """The floors that `--floors` names. It is called before the scoring, so that a mistake costs nothing.

    Args:
        text: names with commas between them; `auto` for all that need no long training; `none`.
    Raises:
        UserError: an unknown name, or a floor that this data cannot have was asked for by name.
    """
    known = all_floors()
    if text == AUTO:
        return dict.fromkeys(known, False)
    if text == NONE:
        return {}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(
                f"--floors {text}: there is no floor {name}; {nearest(name, list(known))}",
                f"names with commas between them, of {', '.join(known)}; or auto, or none",
            )
        problem = known[name].lacks(corpus)
        if problem is not None:
            raise UserError(f"--floors {text}: {problem}", f"leave {name} out")
    return {name: True for name in known if name in names}


TOO_GOOD = "so that a model below such a floor is not shown to be worse"


def fit_floors(subject: Subject, choice: Choice) -> tuple[dict[str, FittedFloor], list[str]]:
    """Fits the chosen floors. Returns them by name, and notes for the reader of the results."""
    known = all_floors()
    fitted: dict[str, FittedFloor] = {}
    notes = []
    for name, asked in choice.items():
        problem = known[name].lacks(subject.corpus)
        try:
            if problem is not None:
                raise LeftOut(f"floor {name} is left out: {problem}")
            fitted[name] = known[name].fit(subject.corpus, subject.catalogue, asked)
        except LeftOut as reason:
            print(str(reason), flush=True)
            notes.append(str(reason))
            continue
        notes += fitted[name].notes
    if fitted and subject.split == "train":
        notes.append(
            f"the floors have counted or learnt these very targets (split train), {TOO_GOOD}: "
            f"{', '.join(fitted)}"
        )
    if "sasrec" in fitted and subject.split == "valid":
        notes.append(f"sasrec chose its settings on these very samples (split valid), {TOO_GOOD}")
    return fitted, notes


def floor_predictions(
    subject: Subject, floor: FittedFloor, order: np.ndarray, k: int
) -> list[dict[str, Any]]:
    """Predictions of a floor, in the form of predictions.jsonl.

    Args:
        order: `eval.predictions.item_order`, which breaks ties. k: length of the lists.
    """
    result = []
    for start in range(0, len(subject.samples), BATCH):
        samples = subject.samples[start : start + BATCH]
        for sample, scores in zip(samples, floor.log_probs([sample.history for sample in samples])):
            target = subject.catalogue.index_of[sample.target]
            top = top_entries(scores, k, order)
            result.append(
                describe(
                    subject,
                    sample,
                    rank=expected_rank(scores, target),
                    tied=num_tied(scores, target),
                    top=top,
                    top_scores=scores[top],
                    nll=-scores[target],
                    curve=nll_curve(scores, target),
                )
            )
    return result
