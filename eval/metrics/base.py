"""What a metric is: its name in results.json, the function that computes it, and how it is read.

A metric family is one file of this folder that binds `METRICS`, a tuple of `Metric`; `table.py` finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eval.intervals import Statistic
from eval.metrics.inputs import Inputs

SIDES = ("accuracy", "item", "provider", "user")
"""Whom a metric is about, in the order of the report."""

ITEM_CUT_OFFS = (5, 10, 20)  # of item-side metrics; MGU@5 is the paper's
PROVIDER_CUT_OFFS = (5, 10)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: key in results.json, with {k} where the metric has a cut-off.
        function: (inputs, k) -> Statistic, or None where the data cannot define it (no providers, no NLL).
        side: one of `SIDES`.
        meaning: what it is, in a few words.
        higher_is_better: None where neither direction is better by itself (read it beside the targets' own
            value).
        ks: "all" = every requested cut-off, a tuple = those of them that are requested too, None = no
            cut-off.
        targets: whether the value of the test targets themselves is shown beside it.
        primary: member of the family that `eval.compare` corrects for (a metric with {k}: at which k).
        needs_lists: whether it reads the recommended lists, which may be shorter than k.
        needs_ranks: whether it reads the targets' ranks, which a search knows only inside its lists.
    """

    name: str
    function: Callable[[Inputs, int | None], Statistic | None]
    side: str
    meaning: str
    higher_is_better: bool | None
    ks: tuple[int, ...] | str | None = None
    targets: bool = False
    primary: bool | int = False
    needs_lists: bool = False
    needs_ranks: bool = False

    def __post_init__(self):
        if self.side not in SIDES:
            raise ValueError(f"metric {self.name}: side is {self.side!r}, not one of {', '.join(SIDES)}")

    def cut_offs(self, requested: tuple[int, ...]) -> list[int | None]:
        """The cut-offs at which it is computed."""
        if self.ks is None:
            return [None]
        return [k for k in requested if self.ks == "all" or k in self.ks]

    def name_at(self, k: int | None) -> str:
        """Key in results.json at this cut-off."""
        return self.name.format(k=k)

    def is_primary(self, k: int | None) -> bool:
        """Whether it is a member of the primary family at this cut-off."""
        return self.primary is True or (self.primary is not False and self.primary == k)


def item_metric(
    name: str,
    function: Callable,
    meaning: str,
    higher_is_better: bool | None,
    *,
    ks: tuple[int, ...] = ITEM_CUT_OFFS,
    targets: bool = True,
    primary: bool | int = False,
    needs_lists: bool = True,
    needs_ranks: bool = False,
) -> Metric:
    """A metric of the items in the lists."""
    return Metric(
        name, function, "item", meaning, higher_is_better, ks, targets, primary, needs_lists, needs_ranks
    )


def provider_metric(name: str, function: Callable, meaning: str, higher_is_better: bool | None) -> Metric:
    """A metric of the providers in the lists."""
    return Metric(
        name,
        function,
        "provider",
        meaning,
        higher_is_better,
        ks=PROVIDER_CUT_OFFS,
        targets=True,
        needs_lists=True,
    )
