"""Better knowledge, or only flatter scores? The target's NLL at the one temperature that suits a run best.

    p_T(i) = exp(s_i / T) / sum_j exp(s_j / T)        s_i: log-probability of catalogue entry i, T: temperature
    calibrated NLL = min over T of mean over samples of -ln p_T(target)

A model that is sure of the wrong titles lowers its NLL by being less sure of everything, without knowing anything more; one
temperature for the whole run takes that difference away and leaves every ranking as it is. A run that knows nothing has ln I
(T to infinity is uniform over the I entries), so ln I minus this figure is what the scores tell about targets, in nats.
Temperature scaling: Guo et al., ICML 2017. T is fitted on the samples it is measured on: one number, about 1 / (2 N) nats too low.

Shapes: N samples, T temperatures, G relevance groups, B bootstrap replicates, I catalogue entries.
"""

from __future__ import annotations

import numpy as np

from eval.intervals import Statistic
from eval.metrics.inputs import Inputs
from eval.metrics.user_side import pool_small

STEPS_PER_OCTAVE = 8
TEMPERATURES = 2.0 ** (
    np.arange(-2 * STEPS_PER_OCTAVE, 6 * STEPS_PER_OCTAVE + 1) / STEPS_PER_OCTAVE
)  # 1/4 to 64


def log_sums(scores: np.ndarray) -> np.ndarray:
    """ln sum_i exp(s_i / T) at each of TEMPERATURES, float64 [T]; scores: [I], NaN counts as impossible.

    Halving a temperature squares exp(s / T): one octave of exponentials gives all the others by multiplication, in an eighth of the time.
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
        scores: [I] log-probabilities, normalised or not; NaN counts as impossible, and a target with NaN gives NaN.
    """
    return log_sums(scores) - float(scores[target]) / TEMPERATURES


def _fit(mean_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the lowest point [B], offset of the parabola's vertex through it and its neighbours, in steps [B]); 0 at the ends."""
    place = np.argmin(np.where(np.isfinite(mean_BT), mean_BT, np.inf), axis=1)
    inner = (place > 0) & (place < mean_BT.shape[1] - 1)
    place_in = np.clip(place, 1, mean_BT.shape[1] - 2)
    low, middle, high = (
        np.take_along_axis(mean_BT, place_in[:, None] + shift, axis=1)[:, 0] for shift in (-1, 0, 1)
    )
    bend = low - 2 * middle + high
    return place, np.where(
        inner & (bend > 0), np.clip((low - high) / (2 * np.where(bend > 0, bend, 1)), -0.5, 0.5), 0.0
    )


def _at(curve_BT: np.ndarray, place: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Curves at place + offset, by the parabola through three points; [B]."""
    last = curve_BT.shape[1] - 1
    low, middle, high = (
        np.take_along_axis(curve_BT, np.clip(place + shift, 0, last)[:, None], axis=1)[:, 0]
        for shift in (-1, 0, 1)
    )
    return np.where(
        offset == 0, middle, middle + offset * (high - low) / 2 + offset**2 * (low - 2 * middle + high) / 2
    )


def lowest(mean_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(lowest mean NLL [B], the temperature there [B]) of mean curves [B, T]."""
    place, offset = _fit(mean_BT)
    return _at(mean_BT, place, offset), _temperature(place, offset)


def _temperature(place: np.ndarray, offset: np.ndarray) -> np.ndarray:
    return TEMPERATURES[place] * 2.0 ** (offset / STEPS_PER_OCTAVE)


def _features(inputs: Inputs) -> np.ndarray | None:
    """[N, (1 + G) (T + 1)]: the curve and a one, for all samples and then for each relevance group; G = 0 without two groups."""

    def make() -> np.ndarray | None:
        if (
            inputs.nll_curve.shape[1] != TEMPERATURES.size
        ):  # scored without the whole catalogue, or on other temperatures
            return None
        known = np.isfinite(inputs.nll_curve).all(axis=1)
        if not known.any():
            return None
        block = np.concatenate(
            [np.where(known[:, None], inputs.nll_curve, 0.0), known[:, None].astype(np.float64)], axis=1
        )
        parts, group = (
            [block],
            pool_small(np.where(inputs.relevance_group >= 0, inputs.relevance_group.astype(str), None)),
        )
        names = sorted({g for g, k in zip(group, known) if g is not None and k})
        parts += [block * np.array([g == name for g in group])[:, None] for name in names if len(names) > 1]
        return np.concatenate(parts, axis=1)

    return inputs.cached("calibration", make)


def _means(totals_BF: np.ndarray) -> np.ndarray:
    """[B, 1 + G, T] mean curves; NaN for a group that a replicate did not draw."""
    blocks = totals_BF.reshape(len(totals_BF), -1, TEMPERATURES.size + 1)
    return blocks[:, :, :-1] / np.where(blocks[:, :, -1:] > 0, blocks[:, :, -1:], np.nan)


def _statistic(inputs: Inputs, finish, smooth: bool, bounds: tuple[float, float]) -> Statistic | None:
    features = _features(inputs)
    return (
        None
        if features is None
        else Statistic(features, finish, int(features[:, TEMPERATURES.size].sum()), smooth, bounds)
    )


def calibrated_nll(inputs: Inputs, k: int | None = None) -> Statistic | None:
    def finish(totals_BF: np.ndarray) -> np.ndarray:
        return lowest(_means(totals_BF)[:, 0])[0]

    return _statistic(inputs, finish, True, (0, np.inf))


def best_temperature(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Above 1: the scores are surer than they should be; an end of TEMPERATURES means that or beyond."""
    return _statistic(
        inputs,
        lambda totals: lowest(_means(totals)[:, 0])[1],
        True,
        (float(TEMPERATURES[0]), float(TEMPERATURES[-1])),
    )


def calibrated_worst_relevance(inputs: Inputs, k: int | None = None) -> Statistic | None:
    """Largest mean over the relevance groups, all at the run's one temperature."""
    features = _features(inputs)
    if features is None or features.shape[1] == TEMPERATURES.size + 1:
        return None

    def finish(totals_BF: np.ndarray) -> np.ndarray:
        means = _means(totals_BF)
        place, offset = _fit(means[:, 0])
        return np.nanmax(
            np.stack([_at(means[:, g], place, offset) for g in range(1, means.shape[1])]), axis=0
        )

    return _statistic(inputs, finish, False, (0, np.inf))
