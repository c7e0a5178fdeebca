"""Settings of groups, weights or blocks that nothing reads are told; those that are read are not."""

from __future__ import annotations

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.objectives import Objective
from gdrt_ds.training import unused


def told(*overrides: str) -> list[str]:
    return [line.split(" ")[0] for line in unused.unused_settings(load_config(None, list(overrides)))]


@pytest.mark.parametrize(
    "given, names",
    [
        (["objective=sft", "dro.tau=0.1"], ["dro.tau"]),
        (["objective=sft", "dro.estimate=ema", "dro.excess=markov"], ["dro.estimate", "dro.excess"]),
        (["objective=msl", "dro.prior=uniform"], ["dro.prior"]),
        (["objective=group_dro", "dro.prior=uniform", "dro.tau=0.1"], ["dro.prior", "dro.tau"]),
        (["objective=group_dro", "dro.eta=1", "dro.estimate=ema", "dro.ema_rate=0.3"], ["dro.ema_rate"]),
        (["objective=sft_go", "dro.worst_weight=1", "dro.tau=9"], ["dro.tau"]),
        (["objective=gdrt", "dro.tau=0.1", "dro.prior=uniform", "dro.excess=markov"], []),
        (["objective=gdrt", "dro.ema_rate=0.3"], ["dro.ema_rate"]),
        (["objective=gdrt", "dro.eta=3", "options.focal_gamma=5"], ["dro.eta", "options.focal_gamma"]),
        (["objective=gdrt", "options.msl_temperature=0.2"], ["options.msl_temperature"]),
        (["objective=gdrt+msl", "options.msl_temperature=0.2"], []),
        (["objective=cvar", "dro.alpha=0.1", "dro.prior=uniform"], ["dro.prior"]),
        (["objective=cvar", "dro.cvar_over=groups", "dro.prior=uniform"], []),
        (
            [
                "objective=gdrt",
                "groups.num=2",
                "dro.frozen_weights=[.5,.5]",
                "dro.tau=.1",
                "dro.excess=markov",
            ],
            ["dro.excess", "dro.tau"],
        ),
        (["train.block_samples=3"], ["train.block_samples"]),
        (["train.block_samples=3", "data.windows=growing"], []),
        (
            ["groups.by=position", "groups.reference=corpus", "groups.binning=uniform"],
            ["groups.reference", "groups.binning"],
        ),
        (["groups.by=item_popularity", "groups.binning=uniform"], []),
        (["groups.refresh_every=5"], ["groups.refresh_every"]),
        (["groups.refresh_every=5", "groups.reference=live"], []),
        ([], []),
    ],
)
def test_what_nothing_reads_is_told_and_nothing_else(given, names):
    assert told(*given) == names


def test_the_line_says_the_value_and_why():
    (line,) = unused.unused_settings(load_config(None, ["objective=sft", "dro.tau=0.1"]))
    assert line == "dro.tau = 0.1 is not used to train with objective=sft"


def test_an_objective_that_does_not_say_what_it_reads_gets_no_line(monkeypatch):
    own = Objective(name="own", source="here", formula="F = sum_i l_i / n")
    monkeypatch.setattr(unused, "get_objective", lambda name: own)
    assert told("dro.tau=0.1", "options.focal_gamma=5") == []
    assert told("dro.estimate=ema") == ["dro.estimate"]
