"""How numbers and names of metrics are written for reading: on pages, in Markdown, on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LABELS = {
    "ndcg": "NDCG",
    "hr": "HR",
    "mrr": "MRR",
    "nll": "Target NLL",
    "nll_calibrated": "NLL, calibrated",
    "nll_calibrated_worst_relevance_group": "NLL, calibrated, worst group",
    "temperature": "Best temperature",
    "nll_worst_group": "NLL, worst group",
    "nll_gap_group": "NLL, group gap",
    "nll_calibrated_worst_group": "NLL, calibrated, worst group",
    "choice_nll": "NLL among the choices",
    "accuracy": "Accuracy",
    "mgu": "MGU",
    "dgu": "DGU",
    "arp": "ARP",
    "aplt": "APLT",
    "rsp": "RSP",
    "reo": "REO",
    "gini": "Gini",
    "cvar_nll": "CVaR of NLL",
    "cvar_rank_share": "CVaR of rank share",
    "nll_worst_relevance_group": "NLL, worst group",
    "nll_gap_relevance_group": "NLL, group gap",
    "mgu_pop5": "MGU, 5 bins",
    "dgu_pop5": "DGU, 5 bins",
    "mgu_genres": "MGU, genres",
    "dgu_genres": "DGU, genres",
    "mgu_test_histories": "MGU, test histories",
    "dgu_test_histories": "DGU, test histories",
    "mgu_flower": "MGU, Flower's bins",
    "dgu_flower": "DGU, Flower's bins",
    "logpopdiff": "LogPopDiff",
    "provider_l1_catalogue": "Provider L1, catalogue",
    "provider_l1_interactions": "Provider L1",
    "provider_minmax": "Provider min/max",
    "provider_gini": "Provider Gini",
}


def number(value: Any) -> str:
    """A figure for reading: about four significant places, and no exponent for ordinary sizes.

    None and NaN are a dash. What float64 arithmetic leaves of a zero (below 1e-15) is written as zero.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 10:
        return f"{value:.2f}"
    if size >= 1e-3:
        return f"{value:.4f}"
    if size < 1e-15:
        return f"{0:.4f}"
    return f"{value:.2g}"


def signed(value: float | None) -> str:
    """A difference for reading: `number` with a plus sign before what is above zero."""
    text = number(value)
    positive = value is not None and value > 0 and text != number(0.0)
    return "+" + text if positive else text


def rank_text(rank: float | None) -> str:
    """A rank for reading, without a needless `.0`; a dash where there is none."""
    if rank is None or math.isnan(rank):
        return "–"
    return f"{rank:,.1f}".removesuffix(".0")


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def span(figure: Mapping[str, Any]) -> str:
    """The interval of a figure of results.json; a dash where it has none."""
    if figure.get("ci_low") is None or figure.get("ci_high") is None:
        return "–"
    return f"{number(figure['ci_low'])} to {number(figure['ci_high'])}"


def label(name: str) -> str:
    """A metric's name for reading: `ndcg@10` becomes `NDCG@10`."""
    stem, _, cut_off = name.partition("@")
    text = LABELS.get(stem, stem.replace("_", " ").capitalize())
    return f"{text}@{cut_off}" if cut_off else text


def direction(higher_is_better: bool | None) -> str:
    """Which way is better, in words."""
    if higher_is_better is None:
        return "read beside the targets"
    return "higher is better" if higher_is_better else "lower is better"


def arrow(higher_is_better: bool | None) -> str:
    """Which way is better, as an arrow."""
    if higher_is_better is None:
        return "·"
    return "↑" if higher_is_better else "↓"
