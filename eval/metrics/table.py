"""The table of metrics: one function and one row each. Adding a metric is writing its function and its row here.

A function takes (inputs, k) and returns a `Statistic`, or None where the data cannot define it (no providers, no NLL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from eval.intervals import Statistic
from eval.metrics import accuracy, calibration, item_side, provider_side, user_side
from eval.metrics.inputs import Inputs

ITEM_KS = (5, 10, 20)  # item- and provider-side metrics; MGU@5 is the paper's


@dataclass(frozen=True)
class Metric:
    """One row.

    name: key in results.json, with {k} where the metric has a cut-off. function: (inputs, k) -> Statistic | None.
    ks: "all" = every requested cut-off, a tuple = those of them that are requested too, None = no cut-off.
    higher_is_better: None where neither direction is better by itself (read it beside the targets' own value).
    targets: whether the value of the test targets themselves is shown beside it.
    primary: member of the family that `eval.compare` corrects for (a metric with {k}: at which k).
    """

    name: str
    function: Callable[[Inputs, int | None], Statistic | None]
    side: str
    meaning: str
    higher_is_better: bool | None
    ks: tuple[int, ...] | str | None = None
    targets: bool = False
    primary: bool | int = False

    def cut_offs(self, requested: tuple[int, ...]) -> list[int | None]:
        if self.ks is None:
            return [None]
        return [k for k in requested if self.ks == "all" or k in self.ks]

    def name_at(self, k: int | None) -> str:
        return self.name.format(k=k)

    def is_primary(self, k: int | None) -> bool:
        return self.primary is True or (self.primary is not False and self.primary == k)


def _item(name: str, function: Callable, meaning: str, higher: bool | None, **options) -> Metric:
    return Metric(
        name,
        function,
        "item",
        meaning,
        higher,
        options.pop("ks", ITEM_KS),
        options.pop("targets", True),
        **options,
    )


def _provider(name: str, function: Callable, meaning: str, higher: bool | None) -> Metric:
    return Metric(name, function, "provider", meaning, higher, (5, 10), True)


METRICS: tuple[Metric, ...] = (
    Metric(
        "ndcg@{k}",
        accuracy.ndcg,
        "accuracy",
        "how high the target stands in the top K",
        True,
        "all",
        primary=10,
    ),
    Metric("hr@{k}", accuracy.hr, "accuracy", "share of targets in the top K", True, "all", primary=10),
    Metric("mrr", accuracy.mrr, "accuracy", "mean of 1 / rank over the whole catalogue", True, primary=True),
    Metric(
        "nll",
        accuracy.nll,
        "accuracy",
        "negative log-likelihood of the target item, nats",
        False,
        primary=True,
    ),
    Metric(
        "nll_calibrated",
        calibration.calibrated_nll,
        "accuracy",
        "NLL of the target at the run's best temperature, nats (ln I knows nothing)",
        False,
    ),
    Metric(
        "temperature",
        calibration.best_temperature,
        "accuracy",
        "that temperature: above 1, scores are too sure",
        None,
    ),
    Metric(
        "mean_rank_share",
        accuracy.mean_rank_share,
        "accuracy",
        "mean rank: 0 first, 0.5 chance, 1 last",
        False,
    ),
    _item(
        "mgu@{k}", item_side.mgu, "mean |list share - history share| over 8 popularity bins", False, primary=5
    ),
    _item(
        "dgu@{k}",
        item_side.dgu,
        "spread of (list share - history share) over 8 popularity bins",
        False,
        primary=5,
    ),
    _item("mgu_pop5@{k}", partial(item_side.mgu, groups="popularity_5"), "MGU over 5 popularity bins", False),
    _item("dgu_pop5@{k}", partial(item_side.dgu, groups="popularity_5"), "DGU over 5 popularity bins", False),
    _item(
        "mgu_genres@{k}",
        partial(item_side.mgu, groups="genres"),
        "MGU over genres (m genres: 1/m each)",
        False,
    ),
    _item("dgu_genres@{k}", partial(item_side.dgu, groups="genres"), "DGU over genres", False),
    _item(
        "mgu_test_histories@{k}",
        partial(item_side.mgu, histories=True),
        "MGU against the test samples' histories (IFairLRS)",
        False,
    ),
    _item(
        "dgu_test_histories@{k}",
        partial(item_side.dgu, histories=True),
        "DGU against the test samples' histories (IFairLRS)",
        False,
    ),
    _item("coverage@{k}", item_side.coverage, "share of the catalogue that is in some list", True),
    _item("gini@{k}", item_side.gini, "inequality of exposure over items, unseen ones included", False),
    _item("entropy@{k}", item_side.entropy, "entropy of exposure over items, nats", True),
    _item("arp@{k}", item_side.arp, "mean train count of recommended items", None),
    _item("aplt@{k}", item_side.aplt, "share of lists outside the most popular fifth of items", None),
    _item(
        "popularity_lift@{k}",
        item_side.popularity_lift,
        "relative rise of popularity from profile to list",
        None,
    ),
    _item(
        "logpopdiff@{k}",
        item_side.logpopdiff,
        "mean ln(popularity + 1) of the list minus that of the profile",
        None,
    ),
    _item("rsp@{k}", item_side.rsp, "uneven chance of being shown, over popularity bins", False),
    _item(
        "reo@{k}",
        item_side.reo,
        "uneven chance of being hit when it is the target, over popularity bins",
        False,
        targets=False,
    ),
    _provider(
        "provider_l1_catalogue@{k}",
        provider_side.provider_l1_catalogue,
        "exposure against catalogue share",
        False,
    ),
    _provider(
        "provider_l1_interactions@{k}",
        provider_side.provider_l1_interactions,
        "exposure against interaction share",
        False,
    ),
    _provider(
        "provider_minmax@{k}",
        provider_side.provider_minmax,
        "least over most favoured provider size bin",
        True,
    ),
    _provider(
        "provider_gini@{k}", provider_side.provider_gini, "inequality of exposure over providers", False
    ),
    _provider(
        "provider_coverage@{k}", provider_side.provider_coverage, "share of providers shown at all", True
    ),
    Metric(
        "cvar_nll",
        user_side.cvar_nll,
        "user",
        "mean NLL of the worst tenth of the samples",
        False,
        primary=True,
    ),
    Metric(
        "cvar_rank_share",
        user_side.cvar_rank_share,
        "user",
        "mean rank share of the worst-ranked tenth",
        False,
    ),
    Metric(
        "nll_worst_relevance_group",
        user_side.relevance_worst_nll,
        "user",
        "NLL of the worst relevance group",
        False,
    ),
    Metric(
        "nll_calibrated_worst_relevance_group",
        calibration.calibrated_worst_relevance,
        "user",
        "calibrated NLL of the worst relevance group, one temperature for all",
        False,
    ),
    Metric(
        "nll_gap_relevance_group",
        user_side.relevance_gap_nll,
        "user",
        "largest minus smallest relevance group NLL",
        False,
    ),
)


def row_of(name: str) -> Metric | None:
    """The row that a name of results.json comes from."""
    stem, _, k = name.partition("@")
    for metric in METRICS:
        if metric.name == name or (k.isdigit() and metric.name == stem + "@{k}"):
            return metric
    return None


def statistics(
    inputs: Inputs, ks: tuple[int, ...], only_targets: bool = False
) -> tuple[dict[str, Statistic], dict[str, Metric], list[str]]:
    """All defined metrics as statistics: (name -> Statistic, name -> row, notes on what could not be measured)."""
    found: dict[str, Statistic] = {}
    rows: dict[str, Metric] = {}
    notes: list[str] = []
    for metric in METRICS:
        if only_targets and not metric.targets:
            continue
        needs_lists = metric.side in ("item", "provider") and metric.name != "reo@{k}"
        for k in metric.cut_offs(ks):
            if k is not None and (k > inputs.num_items or (needs_lists and not inputs.has_lists(k))):
                notes.append(
                    f"{metric.name_at(k)}: not measured, "
                    + (
                        f"K is larger than the catalogue ({inputs.num_items})"
                        if k > inputs.num_items
                        else f"the lists hold {inputs.top.shape[1]} items"
                    )
                )
                continue
            statistic = metric.function(inputs, k)
            if statistic is not None:
                found[metric.name_at(k)], rows[metric.name_at(k)] = statistic, metric
            elif k == metric.cut_offs(ks)[0]:
                notes.append(f"{metric.name.replace('{k}', 'K')}: not defined on this data")
    return found, rows, notes
