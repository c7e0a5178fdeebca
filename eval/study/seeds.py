"""Intervals over users and seeds.

One row of a study is the same training with several seeds, evaluated on the same users. Two things vary:
which users were asked, and which seed trained the model. Both spreads are measured apart:

- Users: with v[s, b] the metric of seed s on the b-th draw of users, the replicates of a row are the means
  over its S seeds. The draws of users are the same for all rows and seeds (`eval.intervals.resample`).
- Seeds: the variance between the S seeds' own values, divided by S. Of a difference between two rows it is
  the variance of the seeds' differences, since both rows have the same seeds.

`eval.intervals.interval` adds the two variances and takes Student's t with Satterthwaite's degrees of
freedom, so that two seeds prove much less than ten. What seeds do not share of the users' noise is in both
variances, which makes intervals a little too wide. How often equal rows are told apart is in
docs/evaluation.md. With one seed the interval is over users alone, and the page says so. `t_interval` is for
figures without replicates per user.

Legend: B replicates, S seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from scipy.stats import t as student

from eval.intervals import Resampled


def shared_seeds(seeds: Mapping[str, Collection[int]], row: str, reference: str) -> list[int]:
    """The seeds that both rows have, over which they are compared; `seeds` has those of each row."""
    return [seed for seed in seeds[row] if seed in seeds[reference]]


def combine(seeds: Sequence[Resampled]) -> Resampled:
    """One statistic of several trainings, resampled over the same users, as one statistic of the row.

    Args:
        seeds: one statistic of each seed, in the same order for every row of a study. Each has replicates [B]
            from the same draws of users.
    """
    values_S = np.array([s.value for s in seeds])
    return Resampled(
        float(np.mean(values_S)),
        np.stack([s.replicates for s in seeds], axis=1).mean(axis=1),
        min(s.n for s in seeds),
        all(s.smooth for s in seeds),
        seeds[0].bounds,
        min(s.units for s in seeds),
        values_S if len(seeds) > 1 else None,
        any(s.linearised for s in seeds),
    )


def combine_all(runs: Sequence[Mapping[str, Resampled]]) -> dict[str, Resampled]:
    """`combine` for every statistic that all runs have."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: combine([run[name] for run in runs]) for name in names}


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values, Student's t; the ends are NaN with fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return mean, mean - half, mean + half
