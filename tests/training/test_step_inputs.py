"""Tests of the facts an objective needs beside losses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gdrt_ds.config import load_config
from gdrt_ds.data.token_facts import TokenFacts
from gdrt_ds.errors import UserError
from gdrt_ds.objectives import get_objective
from gdrt_ds.runtime import single_process_runtime
from gdrt_ds.training.preparation import prepare
from gdrt_ds.training.step import StepRunner
from gdrt_ds.training.step_inputs import InTrie, frozen_weights, token_weights

CPU = torch.device("cpu")


def write_weights(folder, rows):
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"group_weight": row}) + "\n" for row in rows), encoding="utf-8"
    )
    return str(folder)


def test_frozen_weights_of_a_run_are_the_mean_of_its_last_steps(tmp_path):
    run = write_weights(tmp_path, [[0.9, 0.1]] * 5 + [[0.2, 0.8]] * 10 + [[0.4, 0.6]] * 10)
    assert torch.allclose(frozen_weights(run, 2, CPU), torch.tensor([0.3, 0.7], dtype=torch.float64))


def test_a_group_that_was_never_present_weighs_nothing_and_spoils_nothing(tmp_path):
    run = write_weights(tmp_path, [[0.25, None, 0.75], [None, None, 1.0]])
    q = frozen_weights(run, 3, CPU)
    assert q[1] == 0 and torch.isfinite(q).all() and q.sum() == pytest.approx(1.0)


def test_a_weighted_group_whose_losses_are_the_references_has_no_excess():
    """Sums of losses are weighted, so the sums of the reference have to be, or q would follow the weights."""
    runner = StepRunner.__new__(StepRunner)
    runner.plan = SimpleNamespace(step=lambda step: [[np.array([0, 1])]])
    runner.runtime, runner.per_token = single_process_runtime(), False
    runner.tokens = SimpleNamespace(
        store=SimpleNamespace(target_offsets=np.array([0, 2, 4]), sample_of=lambda samples: samples),
        groups=np.array([0, 0, 1, 1]),
        num_groups=2,
        weights=np.array([0.2, 0.2, 1.8, 1.8]),
        reference=np.array([2.0, 3.0, 4.0, 5.0]),
    )
    facts = runner._facts(0)
    assert torch.allclose(facts.counts, torch.tensor([0.4, 3.6], dtype=torch.float64))
    assert torch.allclose(facts.reference / facts.counts, torch.tensor([2.5, 4.5], dtype=torch.float64))


def test_a_listed_weight_of_zero_leaves_its_group_out():
    assert frozen_weights([0, 1, 3], 3, CPU).tolist() == [0, 0.25, 0.75]


@pytest.mark.parametrize("given, word", [([0.5, 0.5], "3 groups"), ("nowhere", "metrics.jsonl")])
def test_frozen_weights_that_do_not_fit_are_refused(given, word):
    with pytest.raises(UserError, match=word):
        frozen_weights(given, 3, CPU)


def weights_one_by_one(config, prepared, name):
    """igd and reweight by their definitions, from the titles alone: one target token after the other."""
    data, titles = prepared.data, [entry.text for entry in prepared.data.catalogue.entries]
    ids = [tuple(data.encoder.target_ids(title)) for title in titles]
    found = []
    for entry in data.targets("train").tolist():
        for place in range(len(ids[entry])):
            if name == "igd":
                next_ones = {other[place] for other in ids if other[:place] == ids[entry][:place]}
                found.append(1.0 if len(next_ones) > 1 else config.options.igd_beta)
            else:
                count = max(1, data.catalogue.entries[entry].train_count)
                found.append(count**-config.options.reweight_power)
    found = np.array(found)
    return found / found.mean() if name == "reweight" else found


@pytest.mark.parametrize("name", ["igd", "reweight"])
def test_fixed_weights_are_kept_once_per_title_and_are_those_of_every_target_token(name, tmp_path):
    config = load_config(
        None,
        [
            f"run.dir={tmp_path}",
            "data.path=planted",
            "data.planted={num_train: 200, num_items: 12}",
            "model.path=tiny-random",
            f"objective={name}",
        ],
    )
    prepared = prepare(config)
    found = token_weights(prepared, InTrie.of(prepared), get_objective(name), config.options)
    titles = sum(len(prepared.data.encoder.target_ids(e.text)) for e in prepared.data.catalogue.entries)
    assert isinstance(found, TokenFacts) and len(found.table) == titles < len(found)
    np.testing.assert_allclose(found.whole(), weights_one_by_one(config, prepared, name), rtol=1e-12)
    assert len(set(found.whole().tolist())) > 1
