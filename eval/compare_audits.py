"""The headline effect of each audit, side by side over runs: what comparing the runs' rankings cannot say.

Audits keep no rows per user, so these are each run's own intervals; nothing here is paired or corrected.
"""

from __future__ import annotations

from typing import Any, Sequence

from eval.report import content

EXPLANATION = (
    "The headline effect of every audit that at least two of the runs have, each with its own 95 % interval over the audited users "
    "(not paired, not corrected)."
)


def audit_rows(runs: Sequence[Any]) -> list[list[str]]:
    """Table rows: audit, effect, and one "value [low, high]" per run ("–" where a run lacks the audit)."""
    names = list(dict.fromkeys(name for run in runs for name in run.results.get("audits") or {}))
    rows = []
    for name in names:
        effects = [((run.results.get("audits") or {}).get(name) or {}).get("effect") for run in runs]
        if sum(effect is not None for effect in effects) >= 2:
            title = next(effect["name"] for effect in effects if effect)
            rows.append([name, title, *(_value(effect) for effect in effects)])
    return rows


def columns(runs: Sequence[Any]) -> list[str]:
    return ["audit", "effect", *(run.label for run in runs)]


def _value(effect: dict[str, Any] | None) -> str:
    if effect is None or effect.get("value") is None:
        return "–"
    if effect.get("ci_low") is None or effect.get("ci_high") is None:
        return content.number(effect["value"])
    return f"{content.number(effect['value'])} [{content.number(effect['ci_low'])}, {content.number(effect['ci_high'])}]"
