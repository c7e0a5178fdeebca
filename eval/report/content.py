"""What the report of one evaluation says: its sections with text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from eval.metrics import metrics as all_metrics
from eval.metrics import row_of
from eval.metrics.inputs import build_inputs
from eval.report import figures
from eval.report.page import Card, Page, Section, Table
from eval.report.words import arrow, direction, label, number, percent, rank_text, span

HEADLINE = (
    "ndcg@10",
    "hr@10",
    "mrr",
    "nll",
    "nll_calibrated",
    "mgu@5",
    "dgu@5",
    "coverage@10",
    "nll_worst_relevance_group",
)
TERMINAL = (
    *HEADLINE,
    "gini@10",
    "arp@10",
    "logpopdiff@10",
    "provider_l1_interactions@10",
    "provider_minmax@10",
    "provider_coverage@10",
    "cvar_nll",
    "temperature",
)
SIDES = {
    "accuracy": (
        "Accuracy",
        "How well the held-out item of each sample is found. Chance and the floors need no language model.",
    ),
    "item": (
        "Item side",
        "Which items the lists show. MGU and DGU compare with the histories; the test targets themselves are "
        "shown beside them, because they too drift away from the histories.",
    ),
    "provider": ("Provider side", "How exposure falls on brands, authors, directors or publishers."),
    "user": (
        "User side",
        "The worst served tenth of the samples, and the relevance group that Group DRO looks at.",
    ),
}
DIMENSIONS = {
    "relevance_group": "relevance group of the target",
    "target_popularity": "popularity of the target",
    "target_in_train": "target seen in train (warm) or not (cold)",
    "history_length": "length of the history",
}
OVER_ALL_TEXT = ("nll", "nll_worst_relevance_group")  # under scoring `full`; the floors' are over titles
EXAMPLES = 6


def build_sections(
    results: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    catalogue_entries: Sequence[Any],
    *,
    training: Sequence[Mapping[str, Any]] = (),
    history_item_counts: Mapping[str, float] | None = None,
) -> Page:
    """All sections of an evaluation report, in reading order."""
    inputs = build_inputs(predictions, catalogue_entries, history_item_counts)
    sections = [_headline(results, inputs.num_samples, len(inputs.user_ids), inputs.num_items)]
    sections += training_section(training)
    sections += _metric_sections(results, inputs)
    sections += _breakdowns(results)
    sections += [audit_section(name, audit) for name, audit in (results.get("audits") or {}).items()]
    sections.append(_examples(predictions, catalogue_entries))
    sections.append(conventions_section(results))
    limit = results.get("limit")
    warning = f"Not a result: limited to {limit} samples (--limit)." if limit else ""
    config = results.get("config") or {}
    name = str(results.get("name") or (config.get("run") or {}).get("dir") or "")
    facts = [
        ("Training objective", results.get("objective")),
        ("Scoring", results.get("scoring")),
        ("Mode", results.get("mode")),
        ("Precision", results.get("dtype")),
        ("Samples", f"{inputs.num_samples:,}"),
        ("Users", f"{len(inputs.user_ids):,}"),
        ("Catalogue", f"{inputs.num_items:,} items"),
        ("Git", str(results.get("git_hash") or "")[:10]),
    ]
    trained = results.get("objective")
    subtitle = ", ".join(
        str(x)
        for x in (
            name.rstrip("/").split("/")[-1],
            f"trained with {trained}" if isinstance(trained, str) else "",
        )
        if x
    )
    return Page(
        "Evaluation report",
        subtitle,
        warning,
        [(k, str(v)) for k, v in facts if v not in (None, "")],
        sections,
    )


def _floors(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """name -> metrics; accepts {"metrics": {...}} as well."""
    return {
        name: floor.get("metrics", floor) for name, floor in (results.get("floors") or {}).items() if floor
    }


def _headline(results: Mapping[str, Any], num_samples: int, num_users: int, num_items: int) -> Section:
    metrics, floors, cards = results["metrics"], _floors(results), []
    for name in HEADLINE:
        if name not in metrics or metrics[name]["value"] is None:
            continue
        figure, row = metrics[name], row_of(name)
        marks = [("this run", figure["value"])]
        if not (results.get("scoring") == "full" and name in OVER_ALL_TEXT):
            marks += [
                (floor, values[name]["value"])
                for floor, values in floors.items()
                if (values.get(name) or {}).get("value") is not None
            ]
        cards.append(
            Card(
                label(name),
                number(figure["value"]),
                span(figure),
                row.meaning if row else "",
                direction(figure.get("higher_is_better")),
                marks,
                figure.get("ci_low"),
                figure.get("ci_high"),
            )
        )
    tables = _minus_floors(results)
    return Section("In short", [_sentence(results, num_samples, num_users, num_items)], cards, tables)


def _minus_floors(results: Mapping[str, Any]) -> list[Table]:
    """The paired differences to each floor; none where an evaluation of an earlier version has none."""
    differences = results.get("minus_floors") or {}
    names = list(dict.fromkeys(name for found in differences.values() for name in found))
    if not names:
        return []
    rows = []
    for name in names:
        found = [own.get(name) for own in differences.values()]
        direction_of = next(figure["higher_is_better"] for figure in found if figure)
        cells = ["–" if one is None else f"{number(one['value'])} ({span(one)})" for one in found]
        rows.append([f"{label(name)} {arrow(direction_of)}", *cells])
    title = (
        "This run minus each floor over the same users, with the 95 % interval of the difference. Where it "
        "spans 0, no difference is shown."
    )
    return [Table(["metric", *(f"minus {floor}" for floor in differences)], rows, title)]


def _sentence(results: Mapping[str, Any], num_samples: int, num_users: int, num_items: int) -> str:
    text = f"{num_samples:,} test samples of {num_users:,} users, a catalogue of {num_items:,} items."
    hit = results["metrics"].get("hr@10")
    if not hit or hit["value"] is None:
        return text
    text += f" The held-out item is in the top 10 for {percent(hit['value'])} of the samples"
    if hit["ci_low"] is None or hit["ci_high"] is None:
        return text + "; one user gives no interval."
    text += f" (95 % interval {percent(hit['ci_low'])} to {percent(hit['ci_high'])})"
    return text + _verdict(results, hit, 10 / num_items)


def _verdict(results: Mapping[str, Any], hit: Mapping[str, Any], chance: float) -> str:
    """Above, below or not told apart from chance and from each floor.

    A floor is judged by the paired difference over the same users: its value may lie inside the model's own
    interval though all users gain, and outside of it though the difference spans zero. Chance has no users.
    """
    sides: dict[str, list[str]] = {"above": [], "below": [], "unclear": []}

    def put(name: str, value: float, low: float | None, high: float | None) -> None:
        side = "unclear"
        if low is not None and high is not None:
            side = "above" if low > 0 else "below" if high < 0 else "unclear"
        sides[side].append(f"{name} ({percent(value)})")

    put("chance", chance, hit["ci_low"] - chance, hit["ci_high"] - chance)
    differences = results.get("minus_floors") or {}
    for name, values in _floors(results).items():
        own = (values.get("hr@10") or {}).get("value")
        paired = (differences.get(name) or {}).get("hr@10")
        if own is not None and paired:
            put(name, own, paired["ci_low"], paired["ci_high"])
    parts = [f"{side} {_listed(names)}" for side, names in sides.items() if names and side != "unclear"]
    if sides["unclear"]:
        parts.append(f"no difference from {_listed(sides['unclear'])} is shown")
    paired = " Floors are compared over the same users." if sum(map(len, sides.values())) > 1 else ""
    return f"; {'; '.join(parts)}.{paired}"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _metric_sections(results: Mapping[str, Any], inputs: Any) -> list[Section]:
    sections, floors = [], _floors(results)
    for side, (title, text) in SIDES.items():
        names = [
            name for name in results["metrics"] if (row_of(name).side if row_of(name) else "accuracy") == side
        ]
        if not names:
            continue
        shown = [floor for floor, values in floors.items() if any(name in values for name in names)]
        rows, explained = [], set()
        for name in names:
            figure, row = results["metrics"][name], row_of(name)
            meaning = row.meaning if row and row.name not in explained else ""
            explained.add(row.name if row else name)
            rows.append(
                [
                    f"{label(name)} {arrow(figure.get('higher_is_better'))}",
                    number(figure["value"]),
                    span(figure),
                    *(number((floors[floor].get(name) or {}).get("value")) for floor in shown),
                    figure["n"],
                    meaning,
                ]
            )
        columns = ["metric", "value", "95 % interval", *shown, "n", "what it is"]
        section = Section(title, [text], tables=[Table(columns, rows)], folded=len(rows) > 14)
        if side == "accuracy":
            section.figures.append(figures.accuracy_by_cutoff(results["metrics"], floors))
        if side == "item":
            section.figures += figures.exposure_figures(inputs)
        if side == "provider":
            section.figures += figures.provider_figures(inputs)
        section.figures = [f for f in section.figures if f]
        sections.append(section)
    return sections


def _breakdowns(results: Mapping[str, Any]) -> list[Section]:
    tables, drawn = [], []
    for dimension, parts in (results.get("breakdowns") or {}).items():
        groups = parts.get("groups") or {}
        if len(groups) < 2:
            continue
        title = DIMENSIONS.get(dimension, dimension.replace(":", " ").replace("_", " "))
        measures = list(next(iter(groups.values())))
        rows = [
            [
                group,
                max(f["n"] for f in values.values()),
                *(f"{number(values[m]['value'])} ({span(values[m])})" for m in measures),
            ]
            for group, values in groups.items()
        ]
        for part in ("worst", "gap", "ratio"):
            rows.append([part, "", *(_summary(parts, m, part) for m in measures)])
        tables.append(Table(["group", "n", *(label(m) for m in measures)], rows, f"By {title}."))
        drawn.append(figures.by_group(title, groups, "ndcg@10"))
        if dimension == "relevance_group":
            drawn.append(figures.by_group(title, groups, "nll"))
    if not tables:
        return []
    text = (
        "Each figure is the mean over the samples of the group, with its 95 % interval. "
        "Worst, gap (max - min) and ratio (min / max) are over "
        "the groups; groups under 10 samples are pooled."
    )
    return [Section("For whom it works", [text], tables=tables, figures=[f for f in drawn if f], folded=True)]


def _summary(parts: Mapping[str, Any], measure: str, part: str) -> str:
    figure = ((parts.get("summary") or {}).get(measure) or {}).get(part)
    return "–" if figure is None else f"{number(figure['value'])} ({span(figure)})"


def training_section(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    drawn = figures.training_figures(rows)
    if not drawn:
        return []
    last = rows[-1]
    text = f"{last.get('step', len(rows)):,} optimizer steps; last loss {number(last.get('loss'))}."
    return [Section("Training", [text], figures=drawn)]


def audit_section(name: str, audit: Mapping[str, Any]) -> Section:
    section = Section(
        f"Audit: {audit.get('title') or name}",
        [
            f"**Question.** {audit['question']}" if audit.get("question") else "",
            f"**Finding.** {audit['finding']}" if audit.get("finding") else "",
        ],
    )
    table = audit.get("table")
    if table:
        section.tables.append(
            Table(
                [str(c) for c in table["columns"]],
                [[c if isinstance(c, str) else number(c) for c in row] for row in table["rows"]],
            )
        )
    section.figures = [figures.checked(f) for f in audit.get("figures") or ()]
    section.paragraphs += [
        f"**{key.capitalize()}.** {audit[key]}" for key in ("control", "cost") if audit.get(key)
    ]
    section.paragraphs = [p for p in section.paragraphs if p]
    return section


def _examples(predictions: Sequence[Mapping[str, Any]], catalogue_entries: Sequence[Any]) -> Section:
    """A few users spread over the ranks, from best to worst, chosen by rank alone."""
    title_of = {i: e.text for e in catalogue_entries for i in (e.item_id, *(e.merged_ids or ()))}
    with_lists = [p for p in predictions if p.get("top_ids")]
    ordered = sorted(
        with_lists,
        key=lambda p: (p["rank"] if p.get("rank") is not None else math.inf, str(p.get("sample_id"))),
    )
    places = sorted({round(q * (len(ordered) - 1)) for q in (0, 0.1, 0.3, 0.5, 0.7, 0.95)}) if ordered else []
    examples = [
        {
            "user": str(p["user_id"]),
            "rank": rank_text(p.get("rank")),
            "target": title_of[p["target_id"]],
            "history": [title_of[i] for i in p.get("history_ids") or ()],
            "top": [
                (title_of[i], i == p["target_id"], i in set(p.get("history_ids") or ()))
                for i in p["top_ids"][:10]
            ],
        }
        for p in (ordered[i] for i in places[:EXAMPLES])
    ]
    text = (
        "Users at fixed places of the rank distribution (best, 10 %, 30 %, median, 70 %, 95 %), not picked "
        "by hand. A filled dot marks the held-out item, a ring an item of the history."
    )
    return Section("Example users", [text], examples=examples)


def conventions_section(results: Mapping[str, Any]) -> Section:
    versions = results.get("versions") or {}
    text = [
        "Intervals are 95 % bootstrap intervals over users (percentile for means, centred for curved "
        "statistics such as MGU, linearised for coverage, Gini and entropy). Formulas and conventions: "
        "docs/evaluation.md."
    ]
    text += [f"Note: {note}." for note in results.get("notes") or ()]
    tables = (
        [Table(["package", "version"], [[str(k), str(v)] for k, v in versions.items()])] if versions else []
    )
    return Section("Conventions and notes", text, tables=tables, folded=True)


def terminal_table(results: Mapping[str, Any], every: bool = False) -> RichTable:
    """The report's main table for a terminal; `every` shows all metrics instead of the usual cut-offs."""
    floors = _floors(results)
    limit = results.get("limit")
    title = " ".join(
        dict.fromkeys(str(results[key]) for key in ("name", "scoring", "mode") if results.get(key))
    )
    table = RichTable(
        title=Text(f"NOT A RESULT (limit {limit}): {title}" if limit else title) if title or limit else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("metric", "value", "95 % interval", *floors):
        table.add_column(
            column, justify="left" if column == "metric" else "right", no_wrap=column != "metric"
        )
    order = [m.name_at(k) for m in all_metrics() for k in ((None,) if m.ks is None else (1, 5, 10, 20, 50))]
    for name in [n for n in order if n in results["metrics"] and (every or n in TERMINAL)]:
        figure = results["metrics"][name]
        table.add_row(
            f"{label(name)} {arrow(figure.get('higher_is_better'))}",
            number(figure["value"]),
            span(figure),
            *(number((values.get(name) or {}).get("value")) for values in floors.values()),
        )
    return table
