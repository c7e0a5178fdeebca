"""Attribution, sensitivity and target losses against per-token references, captum and planted models."""

import numpy as np
import pytest
import torch
from planted_context import HONEST_DATA, PlantedContext
from run_folders import make_run

from eval.audit import AuditContext, AuditOptions, attribution, run_audits
from eval.audit.model import language
from eval.audit.partners import partners
from eval.audit.target_loss import target_nll, token_losses
from eval.loading import load_subject
from eval.scoring import path_scores
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime

OPTIONS = AuditOptions(users=40, num_bootstrap=200)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load_subject(
        Runtime(), run=str(make_run(tmp_path_factory.mktemp("language") / "run", [HONEST_DATA]))
    )


@pytest.fixture(scope="module")
def context(subject):
    return AuditContext(subject, Runtime(), OPTIONS)


def logits_of(context, tokens):
    with torch.no_grad():
        return (
            context.recommender.loaded.model(input_ids=torch.tensor([tokens]), use_cache=False)
            .logits[0]
            .double()
        )


def test_target_losses_equal_a_plain_forward_and_exact_scores(context):
    samples = context.users(6)
    rows = [context.encoded(s) for s in samples]
    blank = context.recommender.encoder.encode(
        [], mask_history=True, blank_instruction=True
    ).input_ids.tolist()  # has another head
    rows += [
        (blank, rows[0][1]),
        (blank, rows[1][1]),
        (blank[:-2] + blank[-1:], rows[2][1]),
    ]  # their own shared beginning, read once
    found = token_losses(context.recommender.reader, context.recommender.trie, rows)
    for (prompt, target), losses in zip(rows, found):
        logits = logits_of(context, prompt + target)
        places = torch.arange(len(target)) + len(prompt) - 1
        expected = -torch.log_softmax(logits[places], -1)[torch.arange(len(target)), torch.tensor(target)]
        assert np.allclose(losses["full"], expected.numpy(), atol=2e-5)
    exact = -context.scores([s.history for s in samples], "scores")[
        np.arange(len(samples)), context.targets(samples)
    ]
    assert np.allclose([f["renormalised"].sum() for f in found[: len(samples)]], exact, atol=1e-4)
    state = context.recommender.reader.read([rows[0][0]])
    path = -path_scores(
        context.recommender.reader,
        context.recommender.trie,
        state,
        [int(context.targets(samples)[0])],
        "full",
    )[0]
    assert target_nll(context, [rows[0][0]], context.targets(samples)[:1]).full[0] == pytest.approx(
        path, abs=1e-4
    )


def test_losses_do_not_depend_on_the_batch_they_are_computed_in(context):
    rows = [context.encoded(s) for s in context.users(7)]
    together = token_losses(context.recommender.reader, context.recommender.trie, rows)
    for row, losses in zip(rows, together):
        alone = token_losses(context.recommender.reader, context.recommender.trie, [row])[0]
        assert np.allclose(alone["full"], losses["full"], atol=1e-5) and np.allclose(
            alone["renormalised"], losses["renormalised"], atol=1e-5
        )


def test_attribution_equals_captum_feature_ablation_and_adds_the_generated_prefix(context):
    captum = pytest.importorskip(
        "captum.attr", reason="captum is not installed (pip install captum==0.9.0 --no-deps)"
    )
    sample, model = context.users(4)[0], context.recommender.loaded.model
    prompt, target = context.encoded(sample)
    encoded = context.recommender.encoder.encode(
        [context.catalogue.text_of(i) for i in sample.history], context.catalogue.text_of(sample.target)
    )
    masks = attribution.part_masks(encoded, set(context.recommender.encoder.tokenizer.all_special_ids))
    baseline = attribution.baseline_token(context.recommender.encoder.tokenizer)
    feature = np.full(len(prompt), 3)
    for index, mask in enumerate(masks):
        feature[mask] = index

    def forward(tokens):  # [1, T] prompt -> [1, N] log-probabilities of the target tokens
        whole = torch.cat([tokens, torch.tensor([target])], dim=1)
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits.double()
        places = torch.arange(len(target)) + tokens.shape[1] - 1
        return torch.log_softmax(logits[:, places], -1)[:, torch.arange(len(target)), torch.tensor(target)]

    theirs = captum.FeatureAblation(forward).attribute(
        torch.tensor([prompt]), baselines=baseline, feature_mask=torch.tensor(feature)[None]
    )
    ours = attribution.attribute(context, [sample], "full")[0]
    for part in range(3):
        assert np.allclose(theirs[:, np.flatnonzero(masks[part])[0]].numpy(), ours.effects[part], atol=5e-5)
    for t in range(
        1, len(target)
    ):  # the prefix, token by token: all earlier target tokens ablated, nothing else
        tokens = prompt + [baseline] * t
        expected = (
            forward(torch.tensor([prompt]))[0, t]
            - torch.log_softmax(logits_of(context, tokens)[-1], -1)[target[t]]
        )
        assert ours.effects[3, t] == pytest.approx(float(expected), abs=5e-5)
    assert np.abs(ours.effects[3]).sum() > 0 and ours.effects[3, 0] == 0


def test_special_tokens_are_never_ablated_and_parts_do_not_overlap(context):
    encoded = context.recommender.encoder.encode(["a b", "c d"], "a b")
    masks = attribution.part_masks(encoded, {int(encoded.input_ids[0])})
    assert not any(mask[0] for mask in masks) and np.stack(masks).sum(axis=0).max() == 1


def test_a_swapped_history_is_another_users_and_does_not_hold_the_target(context):
    samples = context.users(30)
    for shift in (1, 9):
        for index, partner in enumerate(partners(samples, shift)):
            assert (
                samples[partner].user_id != samples[index].user_id
                and samples[index].target not in samples[partner].history
            )


def test_a_shortcut_prompt_is_heard_and_an_honest_model_is_not(subject):
    honest = run_audits(["sensitivity", "language"], PlantedContext(subject, Runtime(), OPTIONS))
    every = ["sensitivity", "information", "language", "history_length"]
    shortcut = run_audits(every, PlantedContext(subject, Runtime(), OPTIONS, "shortcut"))
    assert not honest["sensitivity"]["speaks"] and not honest["language"]["speaks"]
    assert shortcut["sensitivity"]["speaks"] and shortcut["language"]["speaks"]
    assert shortcut["language"]["measures"]["share: instruction"]["value"] > 0.99
    assert honest["language"]["measures"]["share: history"]["value"] > 0.99
    assert (
        shortcut["sensitivity"]["measures"]["swapped history - true"]["value"]
        == 0
        < honest["sensitivity"]["measures"]["swapped history - true"]["ci_low"]
    )
    assert "spans 0" in shortcut["sensitivity"]["finding"]
    assert (
        shortcut["language"]["measures"]["ratio after / before tuning"]["ci_low"] > 100
    )  # the honest base stands beside it
    from eval.study.blocks import AUDITED  # a measure renamed here would leave a study's page silently

    assert all(measure in shortcut[audit]["measures"] for audit, measure, _ in AUDITED.values()), list(
        AUDITED.values()
    )


def test_two_wrong_histories_differ_from_each_other_by_nothing(subject):
    found = run_audits(
        ["sensitivity"], PlantedContext(subject, Runtime(), AuditOptions(users=40, num_bootstrap=400))
    )["sensitivity"]
    control = found["measures"]["control: second swap - swapped"]
    assert control["ci_low"] <= 0 <= control["ci_high"] and found["effect"]["ci_low"] > 0


def test_worst_relevance_group_and_gap_are_those_of_the_group_means():
    groups = np.array([0, 0, 2, 2, 10, 10] * 5)
    nll = np.array([1.0, 3.0, 5.0, 7.0, 1.0, 3.0] * 5)
    rows, spread = language.group_table(groups, nll, None, 50, 0)
    assert [row[0] for row in rows] == ["group 0", "group 2", "group 10"]
    assert (
        [row[2] for row in rows] == [2.0, 6.0, 2.0]
        and spread["worst group NLL"].value == 6.0
        and spread["relevance group NLL gap"].value == 4.0
    )


def test_a_relevance_group_of_one_user_is_never_the_worst():
    groups = np.array([0] * 12 + [1] * 12 + [2, 3, 3])
    nll = np.array([2.0] * 12 + [4.0] * 12 + [9.0, 1.0, 1.0])
    rows, spread = language.group_table(groups, nll, None, 50, 0)
    assert [row[:2] for row in rows] == [["group 0", 12], ["groups 1 to 3", 15]]
    assert spread["worst group NLL"].value == pytest.approx((4 * 12 + 11) / 15)
    rows, spread = language.group_table(groups[10:14], nll[10:14], None, 50, 0)
    assert [row[:2] for row in rows] == [["groups 0 to 1", 4]] and spread == {}
    spread_out = np.arange(32) % 8  # as many users as the audit looks at by default, in eight groups
    rows, _ = language.group_table(spread_out, nll[spread_out], None, 50, 0)
    assert [row[:2] for row in rows] == [["groups 0 to 2", 12], ["groups 3 to 7", 20]]


def test_the_intervals_of_the_worst_group_and_of_the_gap_hold_their_own_values():
    """Groups that differ by noise alone: a resample has larger extremes than the users themselves."""
    rng = np.random.default_rng(3)
    outside = 0
    for seed in range(20):
        _, spread = language.group_table(rng.permutation(120) % 6, rng.exponential(size=120), None, 100, seed)
        for one in spread.values():
            assert one.low <= one.value <= one.high
        gap = spread["relevance group NLL gap"]
        outside += gap.high - gap.value > 2 * (gap.value - gap.low)
    assert outside <= 3


def test_an_unknown_audit_names_the_nearest_and_too_few_users_are_refused(subject):
    with pytest.raises(UserError, match="sensitivty") as error:
        run_audits(["sensitivty"], subject, Runtime())
    assert "sensitivity" in error.value.fix
    with pytest.raises(UserError, match="--audit-users 1"):
        run_audits(["sensitivity"], subject, Runtime(), AuditOptions(users=1))
