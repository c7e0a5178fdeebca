"""GroupDroLoss in a real transformers.Trainer and SFTTrainer.

The exact objective, in sync over ranks, and SFT in its limit.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from gdrt_ds.errors import UserError
from gdrt_ds.integrations import GroupCollator, GroupDroLoss, bin_tokens, score_tokens
from tests.distributed import scenario_integrations as scenario
from tests.forked import run_scenario


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_integrations", tmp_path_factory.mktemp("integrations"), timeout_s=550)


def distance(found, wanted) -> float:
    found, wanted = np.array(found["parameters"]), np.array(wanted["parameters"])
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["batch", "batch_uniform", "ema", "sft"])
def test_trainer_takes_the_steps_of_the_objective_on_one_and_two_ranks(report, case):
    runs = report[case]
    for ranks in (runs["one"], runs["two"]):
        for run in ranks:
            assert distance(run, runs["plain"]) < 2e-6
            assert np.allclose(run["group_loss"], runs["plain"]["group_loss"], atol=2e-6)
            if case in ("ema", "sft"):
                assert np.allclose(run["weights"], runs["plain"]["weights"], atol=1e-5)
    assert runs["two"][0]["weights"] == runs["two"][1]["weights"]


def test_a_first_token_that_is_supervised_has_no_score():
    rows = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(UserError, match="row 1: its first token is supervised"):
        score_tokens(None, rows)


@pytest.mark.distributed
def test_infinite_tau_is_the_trainers_own_training(report):
    assert distance(report["sft"]["one"][0], report["trainer_alone"][0]) < 2e-6
    assert (
        report["sft"]["one"][0]["weights"] == pytest.approx([1.0] * 3)
        and distance(report["batch"]["one"][0], report["trainer_alone"][0]) > 1e-3
    )


@pytest.mark.distributed
def test_group_losses_are_logged_and_the_model_is_left_as_it_was(report):
    run = report["ema"]["one"][0]
    assert {"group_loss_0", "group_loss_2", "group_weight_1"} <= set(run["logged"]) and run[
        "forward_hooks"
    ] == 0


def trained(folder, resume=None, num_groups=scenario.G, **given):
    """(parameters, the loss) of a Trainer of four steps that saves after the second."""
    model, loss = scenario.make_model(), GroupDroLoss(num_groups, tau=0.5)
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=6,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        save_steps=2,
        disable_tqdm=True,
        **given,
    )
    trainer = Trainer(
        model,
        args=settings,
        train_dataset=scenario.Rows(),
        data_collator=GroupCollator(scenario.collate),
        compute_loss_func=loss,
        callbacks=[loss],
    )
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([p.detach().reshape(-1) for _, p in sorted(model.named_parameters())]), loss


@pytest.mark.parametrize("given", [{}, {"restore_callback_states_from_checkpoint": True}])
def test_a_resumed_trainer_goes_on_with_the_averages_and_weights_of_its_checkpoint(tmp_path, given):
    straight, loss = trained(tmp_path)
    weights, state = loss.weights.tolist(), loss.state()
    assert max(weights) - min(weights) > 0.1
    resumed, loss = trained(tmp_path, str(tmp_path / "checkpoint-2"), **given)
    assert torch.equal(resumed, straight) and loss.weights.tolist() == weights and loss.state() == state
    with pytest.raises(UserError, match="num_groups = 4, and the checkpoint has 3 groups"):
        trained(tmp_path, str(tmp_path / "checkpoint-2"), num_groups=4)


def test_rows_that_lost_their_groups_are_told_why():
    with pytest.raises(UserError, match="a row has no `groups`") as error:
        GroupCollator(scenario.collate)([{"input_ids": [1, 2], "labels": [-100, 2]}])
    assert "remove_unused_columns=False" in error.value.fix


def test_equal_scores_that_would_leave_a_group_empty_are_refused():
    scores = [np.array([0.0] * 6 + [-1.0, -2.0]), np.array([0.0] * 6 + [-3.0, -0.5])]
    with pytest.raises(UserError, match="too many scores are equal"):
        bin_tokens(scores, 4)


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_sft_trainer_takes_the_same_steps(report):
    assert distance(report["trl"][0], report["ema"]["plain"]) < 2e-6


def test_settings_that_would_be_wrong_are_refused():
    with pytest.raises(UserError, match="estimate = 'late'"):
        GroupDroLoss(4, estimate="late")
    with pytest.raises(UserError, match="tau = 0"):
        GroupDroLoss(4, tau=0)
    from types import SimpleNamespace

    args = SimpleNamespace(
        n_gpu=1, world_size=2, average_tokens_across_devices=True, gradient_accumulation_steps=2, device="cpu"
    )
    with pytest.raises(UserError, match="gradient_accumulation_steps = 2"):
        GroupDroLoss(4, estimate="batch").on_train_begin(args, None, None, model=torch.nn.Linear(1, 1))
    args.average_tokens_across_devices = False
    with pytest.raises(UserError, match="average_tokens_across_devices"):
        GroupDroLoss(4).on_train_begin(args, None, None, model=torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="callbacks"):
        GroupDroLoss(4)({"logits": torch.zeros(1, 3, 5, requires_grad=True)}, torch.tensor([[1, 2, 3]]))
    with pytest.raises(UserError, match="2 groups for 3 supervised labels"):
        GroupCollator(scenario.collate)(
            [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "groups": [0, 1]}]
        )


def test_relevance_helper_scores_targets_and_bins_them_evenly():
    model, rows = scenario.make_model(), scenario.Rows().rows
    scores = score_tokens(model, rows, batch_size=5)
    row = rows[7]
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    start = len(row["labels"]) - len(row["groups"])
    wanted = [logits[place - 1, row["labels"][place]].item() for place in range(start, len(row["labels"]))]
    assert np.allclose(scores[7], wanted, atol=1e-5) and [len(s) for s in scores] == [
        len(r["groups"]) for r in rows
    ]
    groups, edges = bin_tokens(scores, 4)
    counts = np.bincount(np.concatenate(groups), minlength=4)
    assert counts.max() - counts.min() <= 1 and len(edges) == 3
    flat, member = np.concatenate(scores), np.concatenate(groups)
    assert flat[member == 0].max() < flat[member == 3].min()
    with pytest.raises(UserError, match="distinct values"):
        bin_tokens([np.zeros(5)], 2)
