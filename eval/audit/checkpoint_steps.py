"""One model at several steps of its training: the audits that follow a run along its checkpoints.

    for step, at_step in walk(context): at_step.scores(...)

Step 0 is the base model. The adapter is loaded once; each checkpoint's weights are put into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from eval.audit.base import Lack
from eval.audit.checkpoint_weights import adapter_weights, checkpoint_folders, set_adapter
from eval.audit.context import AuditContext
from gdrt_ds.inference.path_reader import make_reader

MAX_STEPS = 6


def chosen_steps(context: AuditContext, most: int = MAX_STEPS) -> list[tuple[int, Path]]:
    """(step, folder) of at most `most` checkpoints, evenly spread, always with the first and the last."""
    if context.subject.run is None:
        return []
    found = checkpoint_folders(context.subject.run)
    if len(found) <= most:
        return found
    places = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[place] for place in np.unique(places)]


def walk(context: AuditContext, most: int = MAX_STEPS) -> Iterator[tuple[int, AuditContext]]:
    """(step, context of the model at that step): the base model, then every chosen checkpoint.

    All later steps share one context, whose model changes: use each before asking for the next.
    """
    yield 0, context.base()
    recommender = context.variant(context.recommender.adapter, merge=False)
    walker = AuditContext(replace(context.subject, recommender=recommender), context.runtime, context.options)
    for step, folder in chosen_steps(context, most):
        set_adapter(recommender.loaded.model, adapter_weights(folder))
        # The reader's prompt cache holds states of the former weights.
        recommender.reader = make_reader(recommender.loaded.model, recommender.encoder.prefix_ids)
        walker.forget()
        yield step, walker


def lacks_checkpoints(context: AuditContext) -> Lack:
    """For `Audit.lacks` of an audit that walks along checkpoints."""
    if context.subject.run is None or not context.has_adapter:
        return "it follows the checkpoints of a run with an adapter", "give --run RUN_DIR without --base"
    if not chosen_steps(context):
        return (
            f"{context.subject.run} holds no checkpoint",
            "train with train.save_every and a large train.keep_checkpoints",
        )
    return None
