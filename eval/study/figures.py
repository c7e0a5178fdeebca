"""The figures of a study: rows side by side, audits of the rows, and the treatment's difference over the
settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.intervals import Resampled, interval
from eval.study.blocks import Block
from eval.study.seeds import t_interval
from eval.study.words import name_of, one_seed_of, seeds_of
from gdrt_ds.files import finite

DRAWN_AUDITS = ("known through the history, nats", "auxiliary:interaction, log2")
SERIES_NAMES = {"nll_worst_relevance_group": "worst relevance group", "nll": "all targets"}
MAX_UPRIGHT = 5  # more bars than this lie on their side, so that their names can be read


def treatments_of(block: Block, base: str, controls: Sequence[str]) -> list[str]:
    """The rows that are neither the baseline nor a control."""
    return [row for row in block.rows if row != base and row not in controls]


def study_figures(blocks: list[Block], base: str, controls: Sequence[str]) -> list[dict[str, Any]]:
    """Rows side by side in the first setting; treatment minus baseline over the settings, if there are
    several.
    """
    first = blocks[0]
    sliced = [name for name in next(iter(first.rows.values()), {}) if name.startswith("ndcg@10 ")]
    accuracy = sliced or ["ndcg@10"]
    drawn = []
    losses = ["nll_worst_relevance_group", "nll"]
    hits = ["accuracy"]
    for name in next(iter(first.rows.values()), {}):  # rows of prompt and completion
        if name.startswith("nll worst "):
            losses.append(name)
        if name.startswith("accuracy worst "):
            hits.append(name)
    for metrics, title in ((accuracy, "NDCG@10"), (hits, "Accuracy"), (losses, "Target NLL, nats")):
        shared = [name for name in metrics if all(name in samples for samples in first.rows.values())]
        if shared:
            drawn.append(_rows_side_by_side(first, shared, title))
    drawn += [_audit_of_rows(first, name) for name in DRAWN_AUDITS if name in first.audits]
    treatments = treatments_of(first, base, controls)
    if treatments:
        drawn += _over_settings(blocks, base, treatments[0], accuracy)
    return drawn


def _rows_side_by_side(block: Block, metrics: Sequence[str], title: str) -> dict[str, Any]:
    series = []
    for metric in metrics:
        samples = [block.rows[row][metric] for row in block.rows]
        series.append({"name": _series_name(metric), **_bars(samples)})
    return {
        "kind": "bar",
        "title": f"{title} by row",
        "categories": list(block.rows),
        "horizontal": len(block.rows) > MAX_UPRIGHT,
        "y_label": title,
        "caption": f"Setting {block.setting}. {seeds_of(block)}; {_whiskers(block)}",
        "series": series,
    }


def _whiskers(block: Block) -> str:
    alone = one_seed_of(block)
    if not alone:
        return "whiskers are 95 % intervals over users and seeds."
    if all(len(seeds) == 1 for seeds in block.seeds.values()):
        return "whiskers are 95 % intervals over users alone."
    return f"whiskers are 95 % intervals over users and seeds, over users alone for {alone}."


def _series_name(metric: str) -> str:
    """The slice's name for a metric of a slice, else what the metric is over."""
    _, _, slice_name = metric.partition(" ")
    return slice_name or SERIES_NAMES.get(metric, metric)


def _bars(samples: Sequence[Resampled]) -> dict[str, list[float | None]]:
    bounds = [interval(sample) for sample in samples]
    return finite(
        {
            "values": [sample.value for sample in samples],
            "low": [low for low, _ in bounds],
            "high": [high for _, high in bounds],
        }
    )


def _audit_of_rows(block: Block, name: str) -> dict[str, Any]:
    """An audit's figure of every row: the mean over its seeds, with Student's interval."""
    found = [t_interval(list(block.audits[name][row].values())) for row in block.rows]
    series = {
        "name": name,
        "values": [mean for mean, _, _ in found],
        "low": [low for _, low, _ in found],
        "high": [high for _, _, high in found],
    }
    return {
        "kind": "bar",
        "title": f"{name[:1].upper()}{name[1:]} by row",
        "categories": list(block.rows),
        "horizontal": len(block.rows) > MAX_UPRIGHT,
        "y_label": name,
        "legend": False,
        "caption": f"Setting {block.setting}. {seeds_of(block)}; "
        "whiskers are Student's 95 % intervals over seeds, where there are several.",
        "series": [finite(series)],
    }


def _over_settings(
    blocks: Sequence[Block], base: str, treatment: str, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The difference of a treatment to the baseline, by setting; nothing if only one has both rows."""
    kept = [block for block in blocks if treatment in block.comparisons.get(base, {})]
    if len(kept) < 2:
        return []
    drawn = []
    for metric in metrics:
        found = [block.comparisons[base][treatment].get(metric) for block in kept]
        if any(comparison is None for comparison in found):
            continue
        series = {
            "name": treatment,
            "values": [comparison.difference for comparison in found],
            "low": [comparison.ci_low for comparison in found],
            "high": [comparison.ci_high for comparison in found],
        }
        drawn.append(
            {
                "kind": "bar",
                "title": f"{treatment} minus {base}: {name_of(metric)}",
                "categories": [block.setting for block in kept],
                "horizontal": True,
                "legend": False,
                "caption": "Over the settings; an interval that reaches zero shows no difference.",
                "series": [finite(series)],
            }
        )
    return drawn
