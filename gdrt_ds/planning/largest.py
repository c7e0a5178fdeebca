"""The largest micro-batch of a run, which decides whether it fits: not the average one.

Lengths of real data have a long tail. A micro-batch that holds one long row can be a hundred times the
average when rows are padded, and a run that fits on average ends in its first step with such a row.
"""

from __future__ import annotations

import numpy as np

from gdrt_ds.batches import BatchPlan
from gdrt_ds.batches.cost import tokens_of
from gdrt_ds.data.prompts import TokenStore

FIRST = 16
"""Steps that are dealt out in any case."""
HEAVIEST = 8
"""Steps with the most tokens, and as many with the longest rows, that are dealt out as well."""


def largest_micro_batch(
    store: TokenStore, plan: BatchPlan, head: int, packing: str, steps: int
) -> tuple[int, int]:
    """(tokens, target tokens) of the largest micro-batch of the steps that were dealt out.

    They are the first steps and, where the lengths of the rows are known beforehand, the heaviest steps of
    the first epoch. Each of the two figures is the largest one; they may come from different micro-batches.

    Args:
        store: the train rows.
        plan: says which of them meet.
        head: tokens that all prompts begin with.
        packing: how a micro-batch is laid out.
        steps: of the run.
    """
    most_tokens = most_targets = 1
    for step in steps_to_deal(store, plan, steps):
        for members in (members for slots in plan.step(step) for members in slots if len(members)):
            rows = [row[:-1] for row in store.rows(members)]
            most_tokens = max(most_tokens, tokens_of(rows, head, packing))
            samples = store.sample_of(members) if store.rows_change else members
            most_targets = max(most_targets, int(store.num_target[samples].sum()))
    return most_tokens, most_targets


def steps_to_deal(store: TokenStore, plan: BatchPlan, steps: int) -> list[int]:
    """The first steps, and the heaviest ones of the first epoch where the lengths are known."""
    chosen = set(range(min(FIRST, steps)))
    whole = min(steps, plan.count // plan.global_batch)  # a step that begins another epoch is left out
    if whole and not store.rows_change:
        order = plan.order(0)[: whole * plan.global_batch]
        lengths = store.lengths[order].reshape(whole, plan.global_batch)
        for weight in (lengths.sum(axis=1), lengths.max(axis=1)):
            chosen |= set(np.argsort(-weight, kind="stable")[:HEAVIEST].tolist())
    return sorted(chosen)
