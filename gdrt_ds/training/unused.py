"""Settings of groups, weights and blocks that the user gave and that nothing reads: a line for each.

Only values that differ from the default count, because a saved config names every setting. Those of `data`
are in gdrt_ds/data/unused.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from gdrt_ds.config import RunConfig
from gdrt_ds.dro.groups import NUMBERS
from gdrt_ds.objectives import Objective, get_objective, objectives

OF_LOSSES = ("dro.estimate", "dro.ema_rate", "dro.excess")
"""Settings about the group losses that weights hang on."""
OF_VALIDATION = ("dro.tau", "dro.prior")
"""Settings that the validation's figure `objective` has, whatever is trained."""
SCORED = ("relevance", "random")
"""Values of `groups.by` that `groups.reference` scores tokens for."""


def unused_settings(config: RunConfig) -> list[str]:
    """Returns a line for every such setting."""
    objective = get_objective(config.objective)
    found = [*_of_groups(config), *_of_weights(config, objective), *_of_blocks(config)]
    return [
        f"{setting} = {value_of(config, setting)} is not used {why}"
        for setting, why in found
        if value_of(config, setting) != value_of(RunConfig(), setting)
    ]


def value_of(config: RunConfig, setting: str) -> Any:
    """The value of a setting, e.g. of `dro.tau`."""
    return reduce(getattr, setting.split("."), config)


def _of_groups(config: RunConfig) -> Iterator[tuple[str, str]]:
    groups = config.groups
    by, reference = f"with groups.by={groups.by}", groups.reference
    scores = groups.by in SCORED
    if not scores:
        yield "groups.reference", by
    if not (scores and reference == "auxiliary_sft"):
        yield "groups.reference_adapter", f"{by} and groups.reference={reference}"
    if not (groups.by == "relevance" and reference == "live"):
        yield "groups.refresh_every", f"{by} and groups.reference={reference}"
    if groups.by not in NUMBERS:
        yield "groups.binning", f"{by}, which is no number"
    if groups.by not in ("column", "user_attribute"):
        yield "groups.column", by


def _of_weights(config: RunConfig, objective: Objective) -> Iterator[tuple[str, str]]:
    named = f"with objective={config.objective}"
    if not objective.needs_losses:
        for setting in OF_LOSSES:
            yield setting, f"{named}, whose weights do not hang on losses"
    elif config.dro.estimate == "batch":
        yield "dro.ema_rate", "with dro.estimate=batch"
    elif objective.remember is not None:
        yield "dro.ema_rate", f"{named}, which remembers weights and no averages"
    if objective.settings is None:
        return
    read: set[str] = set(objective.settings)
    if objective.per_token(config.dro):
        read.discard("dro.prior")  # every token has the same mass
    why = named
    if config.dro.frozen_weights is not None and objective.needs_losses:
        read -= set(OF_VALIDATION)
        why = "with dro.frozen_weights, which do not move"
        for setting in OF_LOSSES:
            yield setting, why
    known = {setting for one in objectives().values() for setting in one.settings or ()}
    for setting in sorted(known - read):
        yield setting, f"to train {why}" if setting in OF_VALIDATION else why


def _of_blocks(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.data.windows != "growing":
        yield "train.block_samples", f"with data.windows={config.data.windows}"
