"""Other users whose history can stand in for a user's own: audits swap it to see whether it is read."""

from __future__ import annotations

import numpy as np

from gdrt_ds.data.corpus import Sample

ORDER_SEED = 11  # of the ring in which partners are looked for: the same for every model and every audit


def stands_in(other: Sample, sample: Sample) -> bool:
    """Whether the history of `other` can replace that of `sample`.

    It is another user's, it is another history, and the target of `sample` is not in it.
    """
    return (
        other.user_id != sample.user_id
        and sample.target not in other.history
        and other.history != sample.history
    )


def partners(samples: list[Sample], shift: int) -> list[int]:
    """For every sample the index of another user whose history stands in for its own. Deterministic.

    Where no history stands in, which happens among few users alone, another user's is taken all the same;
    `partner_note` counts these.

    Args:
        shift: where the search begins; other shifts find other partners.
    """
    order = np.random.default_rng(ORDER_SEED).permutation(len(samples)).tolist()
    place = {index: p for p, index in enumerate(order)}
    found = []
    for index, sample in enumerate(samples):
        candidates = [order[(place[index] + shift + step) % len(order)] for step in range(len(order))]
        others = [c for c in candidates if samples[c].user_id != sample.user_id]
        clean = [c for c in others if stands_in(samples[c], sample)]
        found.append((clean or others)[0])
    return found


def partner_note(samples: list[Sample]) -> str:
    """A sentence for a finding: how many users have no partner whose history stands in; empty without any."""
    without = sum(not any(stands_in(other, sample) for other in samples) for sample in samples)
    if not without:
        return ""
    return (
        f" For {without} of {len(samples)} users every other history holds the target or equals their own; "
        "one of them is swapped in all the same."
    )
