"""How far the rows of a study are from the floors: what every evaluation found, over the seeds of a row.

An evaluation compares its model with each floor over the same users (`minus_floors` in results.json). A study
takes these differences and needs no floor, and no data, again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval.compare.runs import Run


@dataclass(frozen=True)
class BesideFloor:
    """A metric of a row minus that of a floor.

    Attributes:
        difference: mean over the seeds.
        ci_low: the lowest of the seeds' lower ends, each of a 95 % interval over users.
        ci_high: the highest of their upper ends. So the interval is wide enough for every seed. Both ends are
            None where a seed has no interval (one test user).
        seeds: those whose evaluation has this floor.
        verdict: better or worse where the interval excludes zero; without an interval there are too few users
            to say.
    """

    difference: float
    ci_low: float | None
    ci_high: float | None
    seeds: tuple[int, ...]
    verdict: str


def beside_floors(
    runs: Mapping[str, Mapping[int, Run]],
) -> dict[str, dict[str, dict[str, BesideFloor]]]:
    """Floor -> row -> metric -> the difference; only what evaluations have.

    Args:
        runs: row -> seed -> its evaluation.
    """
    found: dict[str, dict[str, dict[str, BesideFloor]]] = {}
    for row, by_seed in runs.items():
        own: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
        for seed, run in by_seed.items():
            for floor, metrics in run.results.get("minus_floors", {}).items():
                for metric, entry in metrics.items():
                    own.setdefault(floor, {}).setdefault(metric, {})[seed] = entry
        for floor, metrics in own.items():
            rows = found.setdefault(floor, {})
            rows[row] = {metric: _over_seeds(entries) for metric, entries in metrics.items()}
    return found


def _over_seeds(entries: Mapping[int, Mapping[str, Any]]) -> BesideFloor:
    """One metric of one row: its entries in results.json by seed."""
    difference = sum(entry["value"] for entry in entries.values()) / len(entries)
    seeds = tuple(sorted(entries))
    lows = [entry["ci_low"] for entry in entries.values()]
    highs = [entry["ci_high"] for entry in entries.values()]
    if None in lows or None in highs:
        return BesideFloor(difference, None, None, seeds, "too few users to say")
    low = min(lows)
    high = max(highs)
    higher_is_better = next(iter(entries.values()))["higher_is_better"]
    verdict = "interval spans zero"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return BesideFloor(difference, low, high, seeds, verdict)
