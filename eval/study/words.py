"""How metrics, values and seeds of a study are written for reading."""

from __future__ import annotations

from collections.abc import Sequence

from eval.intervals import Resampled, interval
from eval.report.words import arrow, label, number
from eval.study.blocks import Block, higher_is_better
from eval.study.seeds import t_interval


def name_of(metric: str) -> str:
    """`ndcg@10 kind=history` becomes `NDCG@10, kind=history`."""
    name, _, slice_name = metric.partition(" ")
    return f"{label(name)}, {slice_name}" if slice_name else label(name)


def title_of(metric: str) -> str:
    """The name of a metric with the arrow of its direction."""
    return f"{name_of(metric)} {arrow(higher_is_better(metric))}"


def value_text(sample: Resampled | None) -> str:
    """A value with its interval over users, and over seeds if there are several; a dash without a metric."""
    if sample is None:
        return "–"
    return _with_interval(sample.value, *interval(sample))


def seeds_text(values: Sequence[float]) -> str:
    """The mean over seeds, with Student's interval where there are several."""
    mean, low, high = t_interval(values)
    return _with_interval(mean, low, high) if len(values) > 1 else number(mean)


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{number(value)} [{number(low)}, {number(high)}]"


def same_seeds(block: Block) -> bool:
    """Whether all rows of a block were trained with the same seeds."""
    return len({tuple(seeds) for seeds in block.seeds.values()}) == 1


def one_seed_of(block: Block) -> str:
    """`msl (seed 0)`: the rows with one seed, whose intervals are over users alone; empty without any."""
    return ", ".join(f"{row} (seed {seeds[0]})" for row, seeds in block.seeds.items() if len(seeds) == 1)


def seeds_of(block: Block) -> str:
    """`Seeds 0, 1, 2`, or each row's own where they differ."""
    each = {row: ", ".join(map(str, seeds)) for row, seeds in block.seeds.items()}
    if same_seeds(block):
        return f"Seeds {next(iter(each.values()))}"
    return "Seeds: " + "; ".join(f"{row} {seeds}" for row, seeds in each.items())
