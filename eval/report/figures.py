"""The report's own figures, as dictionaries of the schema in eval/report/__init__.py, and its check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics import provider_side
from eval.metrics.inputs import Inputs
from gdrt_ds.errors import UserError

KINDS = ("bar", "line", "stacked_area", "scatter", "heatmap", "tokens")
SEGMENTS = ("instruction", "template", "history", "target")
MAX_POINTS = 400  # a training curve is thinned to this many means


def checked(figure: Mapping[str, Any]) -> dict[str, Any]:
    """The figure, once it fits the schema.

    Raises:
        UserError: it does not; names the figure and what is wrong with it.
    """

    def wrong(problem: str) -> UserError:
        return UserError(
            f"figure {figure.get('title')!r}: {problem}", "see the figure schema in eval/report/__init__.py"
        )

    kind = figure.get("kind")
    if kind not in KINDS:
        raise wrong(f"kind is {kind!r}, allowed are {', '.join(KINDS)}")
    for key in ("title", "caption"):
        if not isinstance(figure.get(key), str):
            raise wrong(f"{key} is missing")
    if kind == "bar":
        for series in figure["series"]:
            _same_length(wrong, series, len(figure["categories"]), "values", "low", "high")
    elif kind in ("line", "stacked_area"):
        for series in figure["series"]:
            _same_length(
                wrong, series, len(figure["x"] if kind == "stacked_area" else series["x"]), "y", "low", "high"
            )
    elif kind == "heatmap":
        if len(figure["values"]) != len(figure["rows"]) or any(
            len(r) != len(figure["columns"]) for r in figure["values"]
        ):
            raise wrong("values are not rows x columns")
    elif kind == "tokens":
        bad = {t.get("segment") for p in figure["prompts"] for t in p["tokens"]} - set(SEGMENTS)
        if bad:
            raise wrong(f"segment is {sorted(map(str, bad))[0]!r}, allowed are {', '.join(SEGMENTS)}")
    return dict(figure)


def _same_length(wrong: Any, series: Mapping[str, Any], length: int, *keys: str) -> None:
    for key in keys:
        if key in series and len(series[key]) != length:
            raise wrong(f"series {series.get('name')!r} has {len(series[key])} {key} for {length} places")


def accuracy_by_cutoff(metrics: Mapping[str, Any], floors: Mapping[str, Any]) -> dict[str, Any] | None:
    ks = sorted(
        int(name[5:]) for name in metrics if name.startswith("ndcg@") and metrics[name]["value"] is not None
    )
    if len(ks) < 2:
        return None
    series = [
        {
            "name": "this run",
            "x": ks,
            "y": [metrics[f"ndcg@{k}"]["value"] for k in ks],
            "low": [metrics[f"ndcg@{k}"]["ci_low"] for k in ks],
            "high": [metrics[f"ndcg@{k}"]["ci_high"] for k in ks],
        }
    ]
    for floor, values in floors.items():
        if all((values.get(f"ndcg@{k}") or {}).get("value") is not None for k in ks):
            series.append({"name": floor, "x": ks, "y": [values[f"ndcg@{k}"]["value"] for k in ks]})
    return {
        "kind": "line",
        "title": "NDCG by list length",
        "series": series,
        "x_label": "K",
        "y_label": "NDCG@K",
        "log_x": True,
        "caption": "The run must stand clear of the floors, which use no language model. "
        "The band is the 95 % interval.",
    }


def exposure_figures(inputs: Inputs) -> list[dict[str, Any]]:
    found = []
    k = next((k for k in (5, 10, 1) if inputs.has_lists(k)), None)
    if k is None or inputs.history_count.sum() == 0:
        return []
    for groups, title, measure, what in (
        ("popularity_8", "Exposure by item popularity", "MGU", "popularity bins of equal item count"),
        (
            "genres",
            "Exposure by genre",
            "MGU over genres",
            "genres, an item with m of them counts 1/m in each",
        ),
    ):
        grouping = inputs.labelling(groups)
        if grouping is None:
            continue

        counts = {
            "train histories": inputs.history_count,
            f"top-{k} lists": inputs.exposure(k).sum(axis=0),
            "test targets": np.bincount(inputs.target, minlength=inputs.num_items),
        }
        parts = {name: _shares(found, grouping.membership) for name, found in counts.items()}
        keep = (
            np.argsort(-parts["train histories"], kind="stable")[:14]
            if len(grouping.names) > 8
            else np.arange(len(grouping.names))
        )
        left_out = (
            f" (the {len(grouping.names) - len(keep)} smallest are left out here)"
            if len(keep) < len(grouping.names)
            else ""
        )
        found.append(
            {
                "kind": "bar",
                "title": title,
                "categories": [grouping.names[i].replace(" (", "\n(") for i in keep],
                "y_label": "share",
                "percent": True,
                "horizontal": len(keep) > 8,
                "series": [{"name": name, "values": values[keep].tolist()} for name, values in parts.items()],
                "caption": f"Shares over {what}{left_out}: {measure}@{k} is the mean distance between the "
                "first two bars; the third shows where the future itself went.",
            }
        )
    return found


def _shares(counts: np.ndarray, membership: Any) -> np.ndarray:
    """Counts of items [I] as shares of their labels [G]; membership: [I, G], rows sum to 1."""
    totals = np.asarray(counts).ravel() @ membership
    return totals / totals.sum()


def provider_figures(inputs: Inputs) -> list[dict[str, Any]]:
    k = next((k for k in (10, 5, 1) if inputs.has_lists(k)), None)
    rows = provider_side.exposure_by_size(inputs, k) if k else []
    if not rows:
        return []
    names = {
        "catalogue_share": "share of catalogue",
        "interaction_share": "share of train interactions",
        "exposure_share": "share of exposure",
    }
    return [
        {
            "kind": "bar",
            "title": "Exposure by provider size",
            "categories": [f"{r['providers']}\n({r['num_providers']})" for r in rows],
            "series": [
                {"name": name, "values": [_finite(r[key]) for r in rows]} for key, name in names.items()
            ],
            "y_label": "share",
            "percent": True,
            "caption": "Providers from the largest to the smallest (number in brackets): "
            f"compare the discounted exposure in the top {k} with "
            "what providers offer and with what users took.",
        }
    ]


def by_group(title: str, groups: Mapping[str, Mapping[str, Any]], measure: str) -> dict[str, Any] | None:
    shown = {
        name: values[measure]
        for name, values in groups.items()
        if (values.get(measure) or {}).get("value") is not None
    }
    if len(shown) < 2:
        return None
    name = {"ndcg@10": "NDCG@10", "nll": "Target NLL"}.get(measure, measure)
    high, low = max(shown, key=lambda g: shown[g]["value"]), min(shown, key=lambda g: shown[g]["value"])
    overlap = _overlap(shown[high], shown[low])
    if shown[high]["value"] > shown[low]["value"]:
        caption = f"Highest for {high}, lowest for {low}; {overlap} (95 %, over users)."
    else:
        same = f"{shown[high]['value']:.4g}"
        caption = f"All slices have the same value, {same}; whiskers are 95 % intervals over users."
    return {
        "kind": "bar",
        "title": f"{name} by {title}",
        "categories": [f"{group}\n(n {f['n']})" for group, f in shown.items()],
        "y_label": name,
        "series": [
            {
                "name": name,
                "values": [f["value"] for f in shown.values()],
                "low": [f["ci_low"] for f in shown.values()],
                "high": [f["ci_high"] for f in shown.values()],
            }
        ],
        "horizontal": len(shown) > 8,
        "caption": caption,
    }


def _overlap(high: Mapping[str, Any], low: Mapping[str, Any]) -> str:
    """Whether the intervals of the slices with the highest and the lowest value overlap, in words."""
    if high["ci_low"] is None or low["ci_high"] is None:
        return "one of the two has no interval, so this test set does not tell them apart"
    if high["ci_low"] > low["ci_high"]:
        return "their intervals do not overlap"
    return "their intervals overlap, so this test set hardly tells them apart"


def training_figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, group losses, group weights and learning rate over the steps of metrics.jsonl."""
    rows = [row for row in rows if row.get("step") is not None]
    if len(rows) < 2:
        return []
    steps = np.array([row["step"] for row in rows], dtype=float)
    found = []
    for key, title, caption, reading in (
        (
            "group_loss",
            "Group losses",
            "One line per group (0 = least tied to the auxiliary tokens): GDRT pulls the upper lines down; "
            "moving averages.",
            0,
        ),
        (
            "group_weight",
            "Group weights q",
            "The share of the gradient that each group gets: groups with a high loss are given more.",
            1,
        ),
    ):
        num_groups = max((len(row.get(key) or ()) for row in rows), default=0)
        if num_groups < 2:
            continue
        columns = np.array(
            [[_nan(row.get(key)[g]) if row.get(key) else math.nan for g in range(num_groups)] for row in rows]
        )
        thin_steps, thin = _thin(steps, columns)
        names = [str(g) for g in range(num_groups)]
        if reading and np.isfinite(thin).all():
            found.append(
                {
                    "kind": "stacked_area",
                    "title": title,
                    "x": thin_steps,
                    "ordered": True,
                    "x_label": "step",
                    "y_label": "weight",
                    "series": [{"name": n, "y": thin[:, g].tolist()} for g, n in enumerate(names)],
                    "caption": caption,
                }
            )
        else:
            found.append(
                {
                    "kind": "line",
                    "title": title,
                    "ordered": True,
                    "x_label": "step",
                    "y_label": "weight" if reading else "loss, nats",
                    "smooth": True,
                    "series": [
                        {"name": n, "x": thin_steps, "y": [_finite(v) for v in thin[:, g]]}
                        for g, n in enumerate(names)
                    ],
                    "caption": caption,
                }
            )
    for key, title, unit, caption in (
        (
            "loss",
            "Training loss",
            "nats per token",
            "Mean loss of the target tokens of each global batch; the bold line is a moving average.",
        ),
        (
            "tokens_per_s",
            "Speed",
            "tokens / s",
            "Tokens per second over all ranks; the bold line is a moving average.",
        ),
        (
            "grad_norm",
            "Gradient norm",
            "norm",
            "Norm before clipping; spikes point at unusual batches, the bold line is a moving average.",
        ),
    ):
        values = np.array([_nan(row.get(key)) for row in rows])
        if np.isfinite(values).sum() >= 2:
            thin_steps, thin = _thin(steps, values[:, None])
            found.append(
                {
                    "kind": "line",
                    "title": title,
                    "series": [
                        {"name": title.lower(), "x": thin_steps, "y": [_finite(v) for v in thin[:, 0]]}
                    ],
                    "x_label": "step",
                    "y_label": unit,
                    "caption": caption,
                    "smooth": True,
                }
            )
    return found


def _thin(steps: np.ndarray, columns: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Means over equal runs of steps, at most MAX_POINTS; NaN only where a whole run is absent."""
    if steps.size <= MAX_POINTS:
        return steps.tolist(), columns
    parts = np.array_split(np.arange(steps.size), MAX_POINTS)
    valid = np.isfinite(columns)
    sums, counts = np.where(valid, columns, 0), valid
    means = [
        np.divide(
            sums[p].sum(0),
            counts[p].sum(0),
            out=np.full(columns.shape[1], np.nan),
            where=counts[p].sum(0) > 0,
        )
        for p in parts
    ]
    return [float(steps[p].mean()) for p in parts], np.array(means)


def _nan(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
