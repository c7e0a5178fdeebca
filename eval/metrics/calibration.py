"""Better knowledge, or only flatter scores? The target's NLL at the one temperature that suits a run best.

    p_T(i) = exp(s_i / T) / sum_j exp(s_j / T)      s_i: log-probability of entry i, T: temperature
    calibrated NLL = min over T of mean over samples of -ln p_T(target)

A model that is sure of the wrong titles lowers its NLL by being less sure of everything, without knowing
anything more. One temperature for the whole run takes that difference away and leaves every ranking as it
is. A run that knows nothing has ln I (T to infinity is uniform over the I entries), so ln I minus this
figure is what the scores tell about targets, in nats. Temperature scaling: Guo et al., ICML 2017. T is
fitted on the samples it is measured on: one number, about 1 / (2 N) nats too low.

Shapes: N samples, T temperatures, G relevance groups, B bootstrap replicates, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eval.intervals import Statistic
from eval.metrics.base import Metric
from eval.metrics.inputs import Inputs
from eval.metrics.slices import pool_small, relevance_names

STEPS_PER_OCTAVE = 8
# From 1/4 to 64: two octaves below 1 and six above.
TEMPERATURES = 2.0 ** (np.arange(-2 * STEPS_PER_OCTAVE, 6 * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE)
RANGE = (float(TEMPERATURES[0]), float(TEMPERATURES[-1]))


def log_sums(scores: np.ndarray) -> np.ndarray:
    """ln sum_i exp(s_i / T) at each of TEMPERATURES, float64 [T].

    Halving a temperature squares exp(s / T): one octave of exponentials gives all the others by
    multiplication, in an eighth of the time.

    Args:
        scores: [I]; NaN counts as impossible.
    """
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores, dtype=np.float64))
    highest = scores.max()
    if not np.isfinite(highest):
        return np.full(TEMPERATURES.size, -np.inf)
    powers = np.exp((scores - highest) / TEMPERATURES[-STEPS_PER_OCTAVE:, None])
    sums = np.empty(TEMPERATURES.size)
    for start in range(TEMPERATURES.size - STEPS_PER_OCTAVE, 0, -STEPS_PER_OCTAVE):
        sums[start : start + STEPS_PER_OCTAVE] = powers.sum(axis=1)
        powers *= powers
    sums[0] = powers[-1].sum()  # 1/4, the end of its own octave
    return np.log(sums) + highest / TEMPERATURES


def nll_curve(scores: np.ndarray, target: int) -> np.ndarray:
    """-ln p_T(target) at each of TEMPERATURES, float64 [T].

    Args:
        scores: [I] log-probabilities, normalised or not; NaN counts as impossible, and a target with NaN
            gives NaN.
    """
    return log_sums(scores) - float(scores[target]) / TEMPERATURES


def _three_points(curve_BT: np.ndarray, place: np.ndarray) -> list[np.ndarray]:
    """The curves left of, at and right of a place [B]; at an end the outer point is the end itself."""
    last = curve_BT.shape[1] - 1
    return [
        np.take_along_axis(curve_BT, np.clip(place + shift, 0, last)[:, None], axis=1)[:, 0]
        for shift in (-1, 0, 1)
    ]


def fit_temperature(mean_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where curves are lowest, by a parabola through the lowest point and its neighbours.

    Returns:
        index of the lowest point [B], and offset of the parabola's vertex from it [B], in steps; 0 at the
        ends.
    """
    place = np.argmin(np.where(np.isfinite(mean_BT), mean_BT, np.inf), axis=1)
    inner = (place > 0) & (place < mean_BT.shape[1] - 1)
    low, middle, high = _three_points(mean_BT, np.clip(place, 1, mean_BT.shape[1] - 2))
    bend = low - 2 * middle + high
    vertex = np.clip((low - high) / (2 * np.where(bend > 0, bend, 1)), -0.5, 0.5)
    return place, np.where(inner & (bend > 0), vertex, 0.0)


def at_temperature(curve_BT: np.ndarray, place: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Curves at place + offset, by the parabola through three points; [B]."""
    low, middle, high = _three_points(curve_BT, place)
    parabola = middle + offset * (high - low) / 2 + offset**2 * (low - 2 * middle + high) / 2
    return np.where(offset == 0, middle, parabola)


def lowest(mean_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lowest mean NLL [B], the temperature there [B]) of mean curves [B, T]."""
    place, offset = fit_temperature(mean_BT)
    return at_temperature(mean_BT, place, offset), TEMPERATURES[place] * 2.0 ** (offset / STEPS_PER_OCTAVE)


def is_at_end(mean_1T: np.ndarray) -> bool:
    """Whether the best temperature of a mean curve [1, T] is an end of TEMPERATURES.

    It is then no rate of successes: the statistic is a curved one, which has no interval where every
    replicate lies on that end.
    """
    return float(lowest(mean_1T)[1][0]) in RANGE


def _features(inputs: Inputs) -> np.ndarray | None:
    """[N, (1 + G) (T + 1)]: the curve and a one, for all samples and then for each relevance group.

    G is 0 without two groups. None if no sample has a curve: it was scored without the whole catalogue, or
    on other temperatures.
    """

    def make() -> np.ndarray | None:
        if inputs.nll_curve.shape[1] != TEMPERATURES.size:
            return None
        known = np.isfinite(inputs.nll_curve).all(axis=1)
        if not known.any():
            return None
        curves = np.where(known[:, None], inputs.nll_curve, 0.0)
        block = np.concatenate([curves, known[:, None].astype(np.float64)], axis=1)
        group = pool_small(relevance_names(inputs))
        names = sorted({g for g, is_known in zip(group, known) if g is not None and is_known})
        blocks = [block]
        if len(names) > 1:
            blocks += [block * np.array([g == name for g in group])[:, None] for name in names]
        return np.concatenate(blocks, axis=1)

    return inputs.cached("calibration", make)


def _means(totals_BF: np.ndarray) -> np.ndarray:
    """[B, 1 + G, T] mean curves; NaN for a group that a replicate did not draw."""
    blocks = totals_BF.reshape(len(totals_BF), -1, TEMPERATURES.size + 1)
    counts = blocks[:, :, -1:]
    return blocks[:, :, :-1] / np.where(counts > 0, counts, np.nan)


def _statistic(
    inputs: Inputs,
    finish: Callable[[np.ndarray], np.ndarray],
    smooth: bool,
    bounds: tuple[float, float],
) -> Statistic | None:
    features = _features(inputs)
    if features is None:
        return None
    num_samples = int(features[:, TEMPERATURES.size].sum())
    return Statistic(features, finish, num_samples, smooth, bounds)


def calibrated_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Mean NLL at the run's best temperature, nats."""

    def finish(totals_BF: np.ndarray) -> np.ndarray:
        return lowest(_means(totals_BF)[:, 0])[0]

    return _statistic(inputs, finish, True, (0, np.inf))


def best_temperature(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Above 1: the scores are surer than they should be. An end of TEMPERATURES means that or beyond."""

    def curve(totals_BF: np.ndarray) -> np.ndarray:
        return _means(totals_BF)[:, 0]

    features = _features(inputs)
    if features is None:
        return None
    smooth = not is_at_end(curve(features.sum(axis=0, keepdims=True)))
    return _statistic(inputs, lambda totals_BF: lowest(curve(totals_BF))[1], smooth, RANGE)


def calibrated_worst_relevance(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest mean over the relevance groups, all at the run's one temperature."""
    features = _features(inputs)
    if features is None or features.shape[1] == TEMPERATURES.size + 1:
        return None

    def finish(totals_BF: np.ndarray) -> np.ndarray:
        means = _means(totals_BF)
        place, offset = fit_temperature(means[:, 0])
        by_group = [at_temperature(means[:, g], place, offset) for g in range(1, means.shape[1])]
        return np.nanmax(np.stack(by_group), axis=0)

    return _statistic(inputs, finish, False, (0, np.inf))


METRICS = (
    Metric(
        "nll_calibrated",
        calibrated_nll,
        "accuracy",
        "NLL of the target at the run's best temperature, nats (ln I knows nothing)",
        False,
    ),
    Metric(
        "temperature",
        best_temperature,
        "accuracy",
        "that temperature: above 1, scores are too sure",
        None,
    ),
    Metric(
        "nll_calibrated_worst_relevance_group",
        calibrated_worst_relevance,
        "user",
        "calibrated NLL of the worst relevance group, one temperature for all",
        False,
    ),
)
