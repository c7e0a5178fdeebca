"""Intervals over users and seeds.

One row of a study is the same training with several seeds, evaluated on the same users. Two things vary:
which users were asked, and which seed trained the model. A replicate draws both with replacement: the users
once for all rows and seeds (`eval.intervals.resample`, paired), the seeds once for all rows. With v[s, b] the
metric of seed s on the b-th draw of users, m[b] its mean over all S seeds and d[b] its mean over the drawn
ones, the replicate is

    m[b] + sqrt(S / (S - 1)) * (d[b] - m[b])

The factor undoes that S drawn seeds vary too little (their variance is short by (S - 1) / S). Seeds share
users, so the draw is crossed, not nested. With one seed the interval is over users alone, and the page says
so. Three to five seeds give a rough idea of the spread between trainings and no more. For that reason
`t_interval`, which is for figures without replicates per user, is wide.

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


def seed_draws(num_seeds: int, num_bootstrap: int, seed: int) -> np.ndarray:
    """Share of every seed in every replicate: float64 [B, S], rows sum to 1."""
    # A second number beside the seed: the draws of users start from the seed alone.
    rng = np.random.default_rng([seed, 77])
    draws = rng.integers(0, num_seeds, size=(num_bootstrap, num_seeds))
    return np.stack([(draws == s).mean(axis=1) for s in range(num_seeds)], axis=1)


def combine(seeds: Sequence[Resampled], seed: int = 0) -> Resampled:
    """One statistic of several trainings, resampled over the same users, as one statistic of the row.

    Args:
        seeds: one statistic of each seed, in the same order for every row of a study. Each has replicates [B]
            from the same draws of users.
        seed: of the draws of seeds, the same for every row.
    """
    values = np.stack([s.replicates for s in seeds], axis=1)  # [B, S]
    count = values.shape[1]
    mean = values.mean(axis=1)
    replicates = mean
    if count > 1:
        drawn = (values * seed_draws(count, len(values), seed)).sum(axis=1)
        replicates = mean + np.sqrt(count / (count - 1)) * (drawn - mean)
    return Resampled(
        float(np.mean([s.value for s in seeds])),
        replicates,
        min(s.n for s in seeds),
        all(s.smooth for s in seeds),
        seeds[0].bounds,
        min(s.units for s in seeds),
    )


def combine_all(runs: Sequence[Mapping[str, Resampled]], seed: int = 0) -> dict[str, Resampled]:
    """`combine` for every statistic that all runs have."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: combine([run[name] for run in runs], seed) for name in names}


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of independent values, Student's t; the ends are NaN with fewer than two."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return mean, mean - half, mean + half
