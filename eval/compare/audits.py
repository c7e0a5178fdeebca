"""The headline effect of each audit, side by side over runs: what comparing the runs' rankings cannot say.

Audits keep no rows per user. These are each run's own intervals; nothing here is paired or corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.compare.runs import Run
from eval.report.words import number

EXPLANATION = (
    "The headline effect of every audit that at least two of the runs have, each with its own 95 % interval "
    "over "
    "the audited users (not paired, not corrected)."
)


def audit_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Table rows: audit, effect, and one "value [low, high]" per run ("–" where a run lacks the audit)."""
    audits = [run.results.get("audits") or {} for run in runs]
    names = dict.fromkeys(name for found in audits for name in found)
    rows = []
    for name in names:
        effects = [(found.get(name) or {}).get("effect") for found in audits]
        present = [effect for effect in effects if effect is not None]
        if len(present) >= 2:
            rows.append([name, present[0]["name"], *(_value(effect) for effect in effects)])
    return rows


def columns(runs: Sequence[Run]) -> list[str]:
    """The column names of `audit_rows`."""
    return ["audit", "effect", *(run.label for run in runs)]


def _value(effect: dict[str, Any] | None) -> str:
    if effect is None or effect.get("value") is None:
        return "–"
    low = effect.get("ci_low")
    high = effect.get("ci_high")
    if low is None or high is None:
        return number(effect["value"])
    return f"{number(effect['value'])} [{number(low)}, {number(high)}]"
