"""The page of a study: what was asked, what came out against the baseline and against the controls, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.intervals import Comparison, Resampled, interval
from eval.report import content
from eval.report.content import Section, Table, number
from eval.seeds import t_interval

# what is left of a difference when scores that are only flatter or sharper no longer count
CALIBRATED = {"nll": "nll_calibrated", "nll_worst_relevance_group": "nll_calibrated_worst_relevance_group"}
DRAWN_AUDITS = ("known through the history, nats", "auxiliary:interaction, log2")
SHOWN = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "ndcg@10",
    "mgu@5",
)


def signed(value: float | None) -> str:
    text = number(value)
    return ("+" if value is not None and value > 0 and text != number(0.0) else "") + text


def title_of(metric: str) -> str:
    """`ndcg@10 kind=history` -> `NDCG@10, kind=history`, with the arrow of its direction."""
    from eval.study import direction  # study imports this module late

    name, _, label = metric.partition(" ")
    return f"{content.label(name)}{', ' + label if label else ''} {content.arrow(direction(metric))}"


def build_page(
    study: Mapping[str, Any], blocks: list, absent: list[str], totals: Mapping[str, Any]
) -> content.Page:
    base, controls = study["baseline"], study["controls"]
    sections = [
        Section(
            "In short",
            [
                study["question"],
                *(
                    sentence(b, row, base, len(blocks) > 1)
                    for b in blocks
                    for row in _treatments(b, base, controls)
                ),
            ],
            figures=figures(blocks, base, controls),
        )
    ]
    for block in blocks:
        sections += block_sections(block, base, len(blocks) > 1)
    notes = [
        "Values are means over the seeds. Intervals are 95 % and cover users and seeds (both drawn with replacement; seeds are few, so read them as "
        "a rough idea of the spread between trainings); audit figures have Student's t interval over seeds. Detectable: the smallest true difference "
        "that these users and seeds would show with 80 % power. Holm's correction runs over the main metrics of one pair of rows.",
        "Worst relevance group: the groups are those of the baseline's run in every row, so that it means the same targets.",
        *dict.fromkeys(note for block in blocks for note in block.notes),
    ]
    if absent:
        notes.append(
            f"Not evaluated yet ({len(absent)} cells): {', '.join(absent[:12])}{' ...' if len(absent) > 12 else ''}."
        )
    sections.append(Section("Conventions and notes", notes))
    facts = [
        ("Cells", str(totals["cells"])),
        (
            "Seeds",
            ", ".join(map(str, sorted({s for b in blocks for found in b.seeds.values() for s in found}))),
        ),
        ("Test users", ", ".join(sorted({f"{b.num_users:,}" for b in blocks}))),
        ("Catalogue", f"{blocks[0].num_items:,} items"),
        (
            "Trained on",
            f"{', '.join(totals['devices'])}, {', '.join(map(str, totals['worlds']))} rank(s), {totals['train_seconds']:,} s in all runs",
        ),
        ("Code", ", ".join(totals["git"])),
    ]
    warning = (
        f"{len(absent)} of {totals['cells'] + len(absent)} cells are not evaluated yet." if absent else ""
    )
    return content.Page("Study", study["name"], warning, facts, sections)


def _treatments(block, base: str, controls: list[str]) -> list[str]:
    return [row for row in block.rows if row != base and row not in controls]


def sentence(block, row: str, base: str, name_setting: bool) -> str:
    """One line per row: what is shown against the baseline, and against which controls its label metrics hold."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    pair = block.comparisons[base][row]
    for name, comparison in pair.items():
        if comparison.family and comparison.verdict in found:
            calibrated = pair.get(CALIBRATED.get(name, ""))
            only_scored = calibrated is not None and calibrated.verdict != comparison.verdict
            shown = calibrated.verdict if only_scored and calibrated.verdict in found else "not shown"
            words = f" as scored; calibrated {signed(calibrated.difference)}, {shown}" if only_scored else ""
            found[comparison.verdict].append(
                f"{title_of(name)[:-2]} ({signed(comparison.difference)}{words})"
            )
    parts = [f"{kind} on {', '.join(names)}" for kind, names in found.items() if names]
    where = f" [{block.setting}]" if name_setting else ""
    return (
        f"**{row}**{where} against {base}: "
        + ("; ".join(parts) if parts else "no difference of the main metrics is shown")
        + "."
    )


def block_sections(block, base: str, several: bool) -> list[Section]:
    where = f"{block.setting}: " if several else ""
    metrics = list(next(iter(block.rows.values())))
    names = [n for n in metrics if n in SHOWN or " " in n] + [
        n for n in metrics if n not in SHOWN and " " not in n
    ]
    rows = [[row, *(_value(samples.get(n)) for n in names)] for row, samples in block.rows.items()]
    rows += [
        [f"floor: {floor}", *(number(values.get(n)) if values.get(n) is not None else "–" for n in names)]
        for floor, values in block.floors.items()
    ]
    sections = [
        Section(
            f"{where}all rows",
            [f"{seeds_of(block)}; {block.num_users:,} users, {block.num_items:,} items."],
            tables=[Table(["row", *map(title_of, names)], rows)],
        )
    ]
    for reference, others in block.comparisons.items():
        if not others:
            continue
        table_rows = [
            _difference(row, n, c)
            for row, comparisons in others.items()
            for n, c in comparisons.items()
            if c.family
        ]
        words = (
            []
            if same_seeds(block)
            else [
                "Over the seeds that both rows have: "
                + "; ".join(
                    f"{row} {', '.join(str(s) for s in block.seeds[row] if s in block.seeds[reference])}"
                    for row in others
                )
                + "."
            ]
        )
        columns = [
            "row",
            "metric",
            reference,
            "row's",
            "difference",
            "95 % interval",
            "Holm p",
            "detectable",
            "verdict",
        ]
        sections.append(
            Section(
                f"{where}against {reference}",
                words,
                tables=[Table(columns, table_rows)],
                folded=reference != base,
            )
        )
    if block.audits:
        audit_rows = [
            [row, *(_seeds(list(values[row].values())) for values in block.audits.values())]
            for row in block.rows
        ]
        differences = [
            [
                f"{row} - {base}",
                *(
                    _seeds([v - values[base][s] for s, v in values[row].items() if s in values[base]])
                    for values in block.audits.values()
                ),
            ]
            for row in block.rows
            if row != base and row in block.comparisons.get(base, {})
        ]
        sections.append(
            Section(
                f"{where}what the prediction hangs on",
                [
                    "Known: nats of ln(catalogue) that the scores give about the target at their best temperature, through the user's own "
                    "history and without it. History sensitivity: target NLL with another user's history minus with the true one, as scored. "
                    "Auxiliary:interaction: attribution of the target's log-probability to prompt and prefix over that to the history, log2 (0 = equal, 1 = twice), and against "
                    "the base model's (0: tuning left it where it was)."
                ],
                tables=[Table(["row", *block.audits], audit_rows + differences)],
            )
        )
    return sections


def same_seeds(block) -> bool:
    return len({tuple(found) for found in block.seeds.values()}) == 1


def seeds_of(block) -> str:
    """`Seeds 0, 1, 2`, or each row's own where they differ."""
    each = {row: ", ".join(map(str, found)) for row, found in block.seeds.items()}
    return (
        f"Seeds {next(iter(each.values()))}"
        if same_seeds(block)
        else "Seeds: " + "; ".join(f"{row} {found}" for row, found in each.items())
    )


def _value(sample: Resampled | None) -> str:
    if sample is None:
        return "–"
    low, high = interval(sample)
    return f"{number(sample.value)} [{number(low)}, {number(high)}]"


def _seeds(values: list[float]) -> str:
    mean, low, high = t_interval(values)
    return f"{number(mean)} [{number(low)}, {number(high)}]" if len(values) > 1 else number(mean)


def _difference(row: str, name: str, found: Comparison) -> list[str]:
    return [
        row,
        title_of(name),
        number(found.baseline),
        number(found.value),
        signed(found.difference),
        f"{signed(found.ci_low)} to {signed(found.ci_high)}",
        number(found.p_holm),
        number(found.minimum_detectable),
        found.verdict,
    ]


def figures(blocks: list, base: str, controls: list[str]) -> list[dict[str, Any]]:
    """Rows side by side in the first setting; treatment minus baseline over the settings, if there are several."""
    first, drawn = blocks[0], []
    labelled = [n for n in next(iter(first.rows.values())) if n.startswith("ndcg@10 ")]
    for names, title in (
        (labelled or ["ndcg@10"], "NDCG@10"),
        (["nll_worst_relevance_group", "nll"], "Target NLL, nats"),
    ):
        names = [n for n in names if all(n in samples for samples in first.rows.values())]
        if names:
            drawn.append(
                _bars(
                    f"{title} by row",
                    list(first.rows),
                    [(_series_name(n), [first.rows[row][n] for row in first.rows]) for n in names],
                    title,
                    f"Setting {first.setting}. {seeds_of(first)}; whiskers are 95 % intervals over users and seeds.",
                )
            )
    drawn += [_audit_bars(first, name) for name in DRAWN_AUDITS if name in first.audits]
    if len(blocks) > 1:
        treatment = next(iter(_treatments(first, base, controls)), None)
        kept = [b for b in blocks if treatment in b.comparisons.get(base, {})]
        for name in labelled or ["ndcg@10"]:
            found = [b.comparisons[base][treatment].get(name) for b in kept]
            if len(kept) > 1 and all(found):
                drawn.append(
                    {
                        "kind": "bar",
                        "title": f"{treatment} minus {base}: {title_of(name)[:-2]}",
                        "categories": [b.setting for b in kept],
                        "horizontal": True,
                        "legend": False,
                        "caption": "Over the settings; an interval that reaches zero shows no difference.",
                        "series": [
                            {
                                "name": treatment,
                                "values": [c.difference for c in found],
                                "low": [c.ci_low for c in found],
                                "high": [c.ci_high for c in found],
                            }
                        ],
                    }
                )
    return drawn


def _series_name(name: str) -> str:
    return name.partition(" ")[2] or {
        "nll_worst_relevance_group": "worst relevance group",
        "nll": "all targets",
    }.get(name, name)


def _audit_bars(block, name: str) -> dict[str, Any]:
    """An audit's figure of every row: the mean over its seeds, with Student's interval where there are several."""
    found = [t_interval(list(block.audits[name][row].values())) for row in block.rows]
    clean = lambda v: None if v != v else v  # noqa: E731
    return {
        "kind": "bar",
        "title": f"{name[:1].upper()}{name[1:]} by row",
        "categories": list(block.rows),
        "horizontal": len(block.rows) > 5,
        "y_label": name,
        "legend": False,
        "caption": f"Setting {block.setting}. {seeds_of(block)}; whiskers are Student's 95 % intervals over seeds, where there are several.",
        "series": [
            {
                "name": name,
                "values": [mean for mean, _, _ in found],
                "low": [clean(low) for _, low, _ in found],
                "high": [clean(high) for _, _, high in found],
            }
        ],
    }


def _bars(
    title: str, rows: list[str], series: list[tuple[str, list[Resampled]]], y_label: str, caption: str
) -> dict[str, Any]:
    clean = lambda v: None if v != v else v  # noqa: E731
    bounds = {name: [interval(s) for s in samples] for name, samples in series}
    return {
        "kind": "bar",
        "title": title,
        "categories": rows,
        "horizontal": len(rows) > 5,
        "y_label": y_label,
        "caption": caption,
        "series": [
            {
                "name": name,
                "values": [clean(s.value) for s in samples],
                "low": [clean(low) for low, _ in bounds[name]],
                "high": [clean(high) for _, high in bounds[name]],
            }
            for name, samples in series
        ],
    }
