"""The line about one group that takes nearly all the weight.

When it is said, and that the tau it names does what it says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdrt_ds import dro
from gdrt_ds.config import RunConfig
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.telemetry import Telemetry
from gdrt_ds.training.weight_watch import WeightWatch, weights_at

OFFICE = [6.3, 2.9, 2.2, 1.2]  # nats: group losses as far apart as on Amazon Office titles
COUNTS = [120.0, 125.0, 125.0, 130.0]


def config_of(objective="gdrt", **section):
    return RunConfig.model_validate({"objective": objective, "dro": section})


def record_of(step, losses=OFFICE, counts=COUNTS, tau=1.0, prior="token_share", skipped=False):
    tensor = torch.tensor(counts, dtype=torch.float64)
    q, _ = dro.closed_form_weights(torch.tensor(losses, dtype=torch.float64), dro.prior(tensor, prior), tau)
    weight = [w if c else None for w, c in zip(q.tolist(), counts)]
    return {
        "step": step,
        "group_weight": [None] * len(counts) if skipped else weight,
        "group_count": counts,
        "skipped": skipped,
    }


def said(watch, records):
    return [(record["step"], text) for record in records for text in [watch.add(record)] if text]


@pytest.mark.parametrize("prior", ["token_share", "uniform"])
@pytest.mark.parametrize("new_tau", [0.5, 1.0, 3.0, 30.0])
def test_weights_at_equals_the_closed_form_at_the_other_tau(prior, new_tau):
    rng = np.random.default_rng(0)
    losses, counts = (
        torch.from_numpy(rng.normal(3, 1.5, (50, 6))),
        torch.from_numpy(rng.integers(0, 9, (50, 6)).astype(float)),
    )
    for loss, count in zip(losses, counts):
        p = dro.prior(count, prior)
        q, _ = dro.closed_form_weights(loss, p, 1.0)
        expected, _ = dro.closed_form_weights(loss, p, new_tau)
        np.testing.assert_allclose(
            weights_at(q.numpy(), p.numpy(), 1.0, new_tau), expected.numpy(), rtol=1e-9, atol=1e-12
        )


def test_it_is_said_once_after_twenty_steps_and_the_named_tau_halves_the_weight():
    lines = said(WeightWatch(config_of(), 100), [record_of(step) for step in range(1, 101)])
    assert [step for step, _ in lines] == [20]
    now, named, smaller = (record_of(1, tau=tau)["group_weight"][0] for tau in (1.0, 5.0, 3.0))
    assert (
        f"group 1 took {now:.2f}" in lines[0][1]
        and "(prior 0.24)" in lines[0][1]
        and f"dro.tau=5 would give it {named:.2f}" in lines[0][1]
    )
    assert now > 0.9 and named <= 0.5 < smaller  # 5 is the smallest of the taus tried that does it


def test_a_short_run_is_judged_at_its_end_and_a_tiny_one_not():
    assert [
        step for step, _ in said(WeightWatch(config_of(), 7), [record_of(step) for step in range(1, 8)])
    ] == [7]
    assert said(WeightWatch(config_of(), 4), [record_of(step) for step in range(1, 5)]) == []


@pytest.mark.parametrize(
    "config, records",
    [
        (config_of(tau=5.0), dict(tau=5.0)),  # a tau that fits
        (config_of("sft"), {}),
        (config_of("focal"), {}),
        (config_of("group_dro"), {}),  # no tau that weighs
        (config_of(frozen_weights=[0.97, 0.01, 0.01, 0.01]), {}),  # fixed by the user
        (config_of(), dict(counts=[900.0, 40.0, 40.0, 20.0])),  # most tokens are of that group anyway
    ],
)
def test_it_is_silent(config, records):
    assert said(WeightWatch(config, 40), [record_of(step, **records) for step in range(1, 41)]) == []


def test_skipped_steps_and_absent_groups():
    records = [
        record_of(1, skipped=True),
        *(record_of(step, counts=[120.0, 0.0, 125.0, 130.0]) for step in range(2, 30)),
    ]
    ((step, text),) = said(WeightWatch(config_of(), 100), records)
    assert step == 21 and "group 1" in text and "(prior 0.32)" in text


def test_gdrt_msl_is_watched_with_a_uniform_prior():
    records = [record_of(step, counts=[5.0, 200.0, 200.0, 200.0], prior="uniform") for step in range(1, 21)]
    assert "(prior 0.25)" in said(WeightWatch(config_of("gdrt+msl", prior="uniform"), 50), records)[0][1]


def test_a_run_prints_it(tmp_path, capsys):
    config = config_of()
    telemetry = Telemetry(tmp_path, config, Runtime(rank=0, local_rank=0, world=1, local_world=1), 25, 0)
    for step in range(1, 26):
        figures = {
            key: torch.tensor([v if v is not None else float("nan") for v in value])
            if isinstance(value, list)
            else value
            for key, value in record_of(step).items()
        }
        telemetry.step(
            figures
            | {
                "loss": 3.1,
                "lr": 0.1,
                "grad_norm": 1.0,
                "tokens": 500,
                "group_loss": torch.tensor(OFFICE),
                "objective": 5.0,
            }
        )
    telemetry.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights:")]
    assert len(lines) == 1 and "dro.tau=5" in lines[0]
