"""The page of a study: what was asked, what came out against baseline and controls, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.intervals import Comparison, interval
from eval.report.page import Page, Section, Table
from eval.report.words import number, signed
from eval.study.blocks import Block
from eval.study.figures import study_figures, treatments_of
from eval.study.reading import Grid
from eval.study.seeds import shared_seeds, t_interval
from eval.study.words import (
    name_of,
    one_seed_of,
    same_seeds,
    seeds_of,
    seeds_text,
    title_of,
    value_text,
)

# What is left of a difference when scores that are only flatter or sharper no longer count.
CALIBRATED = {"nll": "nll_calibrated", "nll_worst_relevance_group": "nll_calibrated_worst_relevance_group"}
# These metrics stand first in the table of all rows.
SHOWN_FIRST = (
    "nll",
    "nll_worst_relevance_group",
    "nll_calibrated",
    "nll_calibrated_worst_relevance_group",
    "ndcg@10",
    "mgu@5",
    "accuracy",
)
MAX_NAMED = 12  # of the cells that are not evaluated yet
CONVENTIONS = (
    "Values are means over the seeds. Intervals are 95 %. They and the p-values cover users and seeds. "
    "The spread over users comes from the bootstrap, that between seeds from the seeds' own values. "
    "Student's t with Satterthwaite's degrees of freedom allows for how few the seeds are.",
    "Audit figures have Student's t interval over seeds. Detectable is the smallest true difference that "
    "these users and seeds would show with 80 % power. Holm's correction runs over the main metrics of one "
    "pair of rows.",
)
ONE_SEED = (
    "What rests on one seed has an interval over users alone. It says nothing about other trainings of the "
    "same row: {rows}."
)
WORST_EXPLAINED = (
    "Worst relevance group: the groups are those of the baseline's run in every row, so that it means the "
    "same targets."
)
WORST_LABEL_EXPLAINED = (
    "Worst: the largest mean NLL, or the lowest accuracy, over the values of the study's label. They are the "
    "same test rows for every row of the study, whatever groups it trained with."
)
FLOORS_EXPLAINED = (
    "Differences are means over the seeds. An interval is over users, and reaches from the lowest end of any "
    "seed's own to the highest, so it holds for every one of these trainings. No correction for several "
    "metrics."
)
AUDITS_EXPLAINED = {
    "known through the history, nats": (
        "Known: nats of ln(catalogue) that the scores give about the target at their best temperature, "
        "through the user's own history and without it."
    ),
    "history sensitivity, nats": (
        "History sensitivity: target NLL with another user's history minus with the true one, as scored."
    ),
    "last item alone costs, nats": (
        "Last item alone costs: target NLL behind the last item of the history minus behind all of it, "
        "as scored."
    ),
    "auxiliary:interaction, log2": (
        "Auxiliary:interaction: attribution of the target's log-probability to prompt and prefix over that "
        "to the history, log2 (0 = equal, 1 = twice), and against the base model's (0: tuning left it where "
        "it was)."
    ),
}


def build_page(grid: Grid, blocks: list[Block], totals: Mapping[str, Any]) -> Page:
    """The whole page, in reading order."""
    study = grid.study
    base = study["baseline"]
    controls = study["controls"]
    several = len(blocks) > 1
    summary = [study["question"]]
    for block in blocks:
        summary += [sentence(block, row, base, several) for row in treatments_of(block, base, controls)]
    sections = [Section("In short", summary, figures=study_figures(blocks, base, controls))]
    for block in blocks:
        sections += block_sections(block, base, several)
    sections.append(_conventions(blocks, grid.absent))
    warning = ""
    if grid.absent:
        num_cells = totals["cells"] + len(grid.absent)
        warning = f"{len(grid.absent)} of {num_cells} cells are not evaluated yet."
    return Page("Study", study["name"], warning, _facts(blocks, totals), sections)


def _facts(blocks: Sequence[Block], totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeds = sorted({seed for block in blocks for found in block.seeds.values() for seed in found})
    users = sorted({f"{block.num_users:,}" for block in blocks})
    ranks = ", ".join(map(str, totals["worlds"]))
    devices = ", ".join(totals["devices"])
    return [
        ("Cells", str(totals["cells"])),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Test users", ", ".join(users)),
        ("Catalogue", catalogue_size(blocks[0])),
        ("Trained on", f"{devices}, {ranks} rank(s), {totals['train_seconds']:,} s in all runs"),
        ("Code", ", ".join(totals["git"])),
    ]


def catalogue_size(block: Block) -> str:
    """The number of items, in words."""
    if block.num_items is None:
        return "none: rows of prompt and completion"
    return f"{block.num_items:,} items"


def _conventions(blocks: Sequence[Block], absent: Sequence[str]) -> Section:
    explained = WORST_EXPLAINED
    if blocks[0].num_items is None:
        explained = WORST_LABEL_EXPLAINED
    alone = [block for block in blocks if one_seed_of(block)]
    words = "; ".join(f"{block.setting}: {one_seed_of(block)}" for block in alone)
    one_seed = [ONE_SEED.format(rows=words)] if words else []
    notes = [
        *CONVENTIONS,
        *one_seed,
        explained,
        *dict.fromkeys(note for block in blocks for note in block.notes),
    ]
    if absent:
        more = " ..." if len(absent) > MAX_NAMED else ""
        notes.append(f"Not evaluated yet ({len(absent)} cells): {', '.join(absent[:MAX_NAMED])}{more}.")
    return Section("Conventions and notes", notes)


def sentence(block: Block, row: str, base: str, name_setting: bool) -> str:
    """One line per row: what is shown to be better or worse than the baseline.

    Where a difference of scores is not shown once the scores are calibrated, the line says what is left of
    it. Where rows differ in their seeds, the line says how many it is about. One seed alone is always said:
    it is a weaker claim.
    Where the row shares no seed with the baseline, there is nothing to compare yet, and the line says that.
    """
    where = f" [{block.setting}]" if name_setting else ""
    comparisons = block.comparisons.get(base, {}).get(row)
    if comparisons is None:
        return f"**{row}**{where}: no run of {base} with the same seed is evaluated yet."
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for name, comparison in comparisons.items():
        if not comparison.family or comparison.verdict not in found:
            continue
        words = signed(comparison.difference)
        calibrated = comparisons.get(CALIBRATED.get(name, ""))
        if calibrated is not None and calibrated.verdict != comparison.verdict:
            shown = calibrated.verdict if calibrated.verdict in found else "not shown"
            words += f" as scored; calibrated {signed(calibrated.difference)}, {shown}"
        found[comparison.verdict].append(f"{name_of(name)} ({words})")
    parts = [f"{kind} on {', '.join(names)}" for kind, names in found.items() if names]
    text = "; ".join(parts) or "no difference of the main metrics is shown"
    seeds = ""
    shared = shared_seeds(block.seeds, row, base)
    if len(shared) == 1:
        seeds = f" (seed {shared[0]} alone)"
    elif not same_seeds(block):
        seeds = f" ({len(shared)} seeds)"
    return f"**{row}**{where} against {base}{seeds}: {text}."


def block_sections(block: Block, base: str, several: bool) -> list[Section]:
    """The sections of one setting.

    Args:
        several: whether the study has several settings, so that titles name them.
    """
    where = f"{block.setting}: " if several else ""
    sections = [_all_rows(block, where)]
    for reference, others in block.comparisons.items():
        if others:
            section = _against(block, reference, where)
            section.folded = reference != base
            sections.append(section)
    if block.beside_floors:
        sections.append(_against_floors(block, where))
    if block.audits:
        sections.append(audits_section(block, base, where))
    return sections


def _all_rows(block: Block, where: str) -> Section:
    """Every row with every metric, then the floors."""
    metrics = list(next(iter(block.rows.values())))
    first = [name for name in metrics if name in SHOWN_FIRST or " " in name]
    names = first + [name for name in metrics if name not in first]
    rows = [[row, *(value_text(samples.get(name)) for name in names)] for row, samples in block.rows.items()]
    for floor, values in block.floors.items():
        rows.append([f"floor: {floor}", *(number(values.get(name)) for name in names)])
    text = [f"{seeds_of(block)}; {block.num_users:,} users; catalogue: {catalogue_size(block)}."]
    alone = one_seed_of(block)
    if alone:
        text.append(f"Intervals are over users alone for {alone}.")
    return Section(f"{where}all rows", text, tables=[Table(["row", *map(title_of, names)], rows)])


def _against(block: Block, reference: str, where: str) -> Section:
    """The differences of the main metrics to one reference row."""
    others = block.comparisons[reference]
    columns = ["row", "metric", reference, "row's", "difference", "95 % interval", "Holm p", "detectable"]
    columns.append("verdict")
    rows = []
    for row, comparisons in others.items():
        rows += [_difference(row, name, found) for name, found in comparisons.items() if found.family]
    words = []
    alone = [row for row in others if len(shared_seeds(block.seeds, row, reference)) == 1]
    if alone:
        words.append(f"One seed is shared, so intervals are over users alone: {', '.join(alone)}.")
    if not same_seeds(block):
        shared = []
        for row in others:
            shared.append(f"{row} {', '.join(map(str, shared_seeds(block.seeds, row, reference)))}")
        words.append(f"Over the seeds that both rows have: {'; '.join(shared)}.")
    return Section(f"{where}against {reference}", words, tables=[Table(columns, rows)])


def _difference(row: str, metric: str, found: Comparison) -> list[str]:
    return [
        row,
        title_of(metric),
        number(found.baseline),
        number(found.value),
        signed(found.difference),
        f"{signed(found.ci_low)} to {signed(found.ci_high)}",
        number(found.p_holm),
        number(found.minimum_detectable),
        found.verdict,
    ]


def _against_floors(block: Block, where: str) -> Section:
    """What every row has that the floors do not: nobody needs a model that a popularity list beats."""
    columns = ["row", "floor", "metric", "row minus floor", "95 % interval", "seeds", "verdict"]
    rows = []
    for row in block.rows:
        for floor, found in block.beside_floors.items():
            for metric, beside in found.get(row, {}).items():
                rows.append(
                    [
                        row,
                        floor,
                        title_of(metric),
                        signed(beside.difference),
                        f"{signed(beside.ci_low)} to {signed(beside.ci_high)}",
                        ", ".join(map(str, beside.seeds)),
                        beside.verdict,
                    ]
                )
    return Section(f"{where}against the floors", [FLOORS_EXPLAINED], tables=[Table(columns, rows)])


def audits_section(block: Block, base: str, where: str) -> Section:
    """The audits of every row, then their differences to the baseline, seed by seed."""
    rows = []
    for row in block.rows:
        rows.append([row, *(seeds_text(list(values[row].values())) for values in block.audits.values())])
    for row in block.rows:
        if row == base or row not in block.comparisons.get(base, {}):
            continue
        cells = [f"{row} - {base}"]
        for values in block.audits.values():
            before = values[base]
            cells.append(
                seeds_text([value - before[seed] for seed, value in values[row].items() if seed in before])
            )
        rows.append(cells)
    table = Table(["row", *block.audits], rows)
    explained = " ".join(text for title, text in AUDITS_EXPLAINED.items() if title in block.audits)
    return Section(f"{where}what the prediction hangs on", [explained], tables=[table])


# -- study.json ------------------------------------------------------------------------------------
def to_json(grid: Grid, blocks: list[Block], totals: Mapping[str, Any]) -> dict[str, Any]:
    """The content of study.json; NaN is made null by its writer (`gdrt_ds.files.write_json`)."""
    return {
        "study": dict(grid.study),
        "settings": {block.setting: _block_json(block) for block in blocks},
        "not_evaluated": grid.absent,
        "totals": dict(totals),
    }


def _block_json(block: Block) -> dict[str, Any]:
    rows = {}
    for row, samples in block.rows.items():
        rows[row] = {name: _figure(sample.value, *interval(sample)) for name, sample in samples.items()}
    differences: dict[str, Any] = {}
    for reference, others in block.comparisons.items():
        differences[reference] = {
            row: {name: asdict(found) for name, found in comparisons.items()}
            for row, comparisons in others.items()
        }
    audits: dict[str, Any] = {}
    for title, values in block.audits.items():
        audits[title] = {}
        for row, by_seed in values.items():
            seeds = list(by_seed.values())
            audits[title][row] = {**_figure(*t_interval(seeds)), "seeds": seeds}
    return {
        "seeds": sorted({seed for seeds in block.seeds.values() for seed in seeds}),
        "seeds_of_rows": block.seeds,
        "num_users": block.num_users,
        "num_items": block.num_items,
        "rows": rows,
        "differences": differences,
        "audits": audits,
        "floors": block.floors,
        "minus_floors": _floors_json(block),
        "notes": block.notes,
    }


def _floors_json(block: Block) -> dict[str, Any]:
    return {
        floor: {
            row: {metric: asdict(beside) for metric, beside in metrics.items()}
            for row, metrics in rows.items()
        }
        for floor, rows in block.beside_floors.items()
    }


def _figure(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "ci_low": low, "ci_high": high}
