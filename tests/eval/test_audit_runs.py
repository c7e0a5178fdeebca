"""Every audit end to end on tiny run folders: checkpoints, several runs, the command line, the report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import make_run

from eval import folders
from eval.audit import AuditOptions, audits, checkpoint_weights, run_audits
from eval.audit.__main__ import main as audit_runs
from eval.audit.context import AuditContext
from eval.audit.model import amplification
from eval.audit.runs import cross_tuning, debiasing
from eval.audit.title_prior import content_free_prompt, title_log_probs, title_tokens
from eval.loading import load_subject
from eval.run import main as evaluate
from gdrt_ds.errors import UserError
from gdrt_ds.runtime import Runtime
from gdrt_ds.training import checkpoint, durable, lives
from tests.distributed.launch import play
from tests.distributed.ranks import preload

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
OPTIONS = AuditOptions(users=6, num_bootstrap=50, permutations=2)


def publish(run, step: int, scale: float, world: int = 2) -> None:
    """A checkpoint as the trainer's ranks leave it: `scale` x the adapter's weights, cut at odd places."""
    from safetensors.torch import load_file

    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    scratch = run / "checkpoints" / f".step_{step}.life_1"
    scratch.mkdir(parents=True)
    slices = [{} for _ in range(world)]
    for name, value in weights.items():
        flat, cut = value.flatten() * (scale if "lora_B" in name else 1.0), value.numel() // 3 + 1
        name = f"model.{name.replace('.weight', '.default.weight')}"
        slices[0][f"{name}|0|weight"], slices[-1][f"{name}|{cut}|weight"] = (
            flat[:cut].clone(),
            flat[cut:].clone(),
        )
        slices[0][f"{name}|0|exp_avg"] = torch.zeros(cut)
    for rank, part in enumerate(slices):
        durable.save_tensors(
            {**part, "rng.torch": torch.zeros(4, dtype=torch.uint8)}, scratch / f"rank_{rank:05d}.safetensors"
        )
    (scratch / "state.json").write_text("{}")
    about = {
        "format": checkpoint.FORMAT,
        "step": step,
        "world": world,
        "life": 1,
        "fingerprint": "",
        "stage": 3,
    }
    checkpoint._publish(run, scratch, run / "checkpoints" / f"step_{step}", about, 10, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four evaluated runs: two objectives x two seeds, one with checkpoints."""
    base, made = tmp_path_factory.mktemp("runs"), []
    for objective in ("sft", "gdrt"):
        for seed in (0, 1):
            run = make_run(
                base / f"{objective}-{seed}", [f"objective={objective}", f"train.seed={seed}"], seed=seed
            )
            evaluate(
                [
                    "--run",
                    str(run),
                    "--limit",
                    "12",
                    "--bootstrap",
                    "20",
                    "--no-floors",
                    "--audit",
                    "sensitivity,dimensionality",
                    "--audit-users",
                    "6",
                ]
            )
            made.append(run)
    lives.begin_life(made[0])
    publish(made[0], 10, 0.5)
    publish(made[0], 20, 1.0)
    return made


@pytest.fixture(scope="module")
def subject(runs):
    return load_subject(Runtime(), run=str(runs[0]))


def test_every_audit_runs_from_the_command_line_and_is_in_the_report(runs, capsys):
    output = runs[0] / "eval" / "everything"
    evaluate(
        [
            "--run",
            str(runs[0]),
            "--limit",
            "12",
            "--bootstrap",
            "20",
            "--no-floors",
            "--audit",
            "all",
            "--audit-users",
            "6",
            "--permutations",
            "2",
            "--output",
            str(output),
            "--runs",
            *map(str, runs),
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads((output / "results.json").read_text())["audits"]
    assert set(found) == set(audits())
    page = (output / "report.html").read_text()
    for name, audit in found.items():
        assert f"audit {name}: " in printed and printed.index(f"audit {name}: ") < printed.index(
            audit["finding"]
        )
        assert (
            audit["figures"]
            and audit["control"]
            and audit["cost"]
            and audit["table"]["rows"]
            and audit["title"] in page
        )
        if name == "shift":  # six users: no environment has five of them
            assert audit["effect"]["value"] is None or np.isfinite(audit["effect"]["value"])
        else:
            assert np.isfinite(audit["effect"]["value"])
        assert any(m["ci_low"] is not None for m in audit["measures"].values())


def test_two_ranks_find_what_one_rank_finds(runs, tmp_path):
    words = ["--run", str(runs[1]), "--limit", "12", "--bootstrap", "20", "--no-floors"]
    words += ["--audit", "sensitivity,dimensionality", "--audit-users", "6", "--output", str(tmp_path)]
    preload()
    done = play(2, words, tmp_path / "logs", main=evaluate)
    assert done.statuses == [0, 0], done.text
    one, two = (
        json.loads((folder / "results.json").read_text())["audits"]
        for folder in (next((runs[1] / "eval").iterdir()), tmp_path)
    )
    for name, audit in one.items():
        for measure, estimate in audit["measures"].items():
            assert estimate["value"] == pytest.approx(two[name]["measures"][measure]["value"], abs=1e-4), (
                name,
                measure,
            )
            assert estimate["ci_low"] == pytest.approx(two[name]["measures"][measure]["ci_low"], abs=1e-4)
    assert "2 rank(s)" in two["sensitivity"]["cost"]


def test_all_leaves_out_what_cannot_run_and_says_so_and_a_name_is_refused(subject, runs, capsys):
    bare = load_subject(Runtime(), run=str(runs[1]))  # no checkpoints
    with pytest.raises(UserError, match="holds no checkpoint"):
        run_audits(["amplification"], bare, Runtime(), OPTIONS)
    with pytest.raises(UserError, match="compares at least 4 runs, --runs names 0"):
        run_audits(["cross_tuning"], subject, Runtime(), OPTIONS)
    with pytest.raises(UserError, match="holds no evaluation"):
        folders.load_evaluations([runs[0] / "base", runs[1]], 2)
    reasons = {name: audit.lacks(AuditContext(bare, Runtime(), OPTIONS)) for name, audit in audits().items()}
    lacking = {"amplification", "drift", "cross_tuning", "debiasing"}
    assert {n for n, reason in reasons.items() if reason} == lacking


def test_checkpoint_slices_give_the_adapter_back_to_the_bit_and_damage_is_refused(runs, subject):
    from safetensors.torch import load_file

    context = AuditContext(subject, Runtime(), OPTIONS)
    saved = load_file(runs[0] / "adapter" / "adapter_model.safetensors")
    steps = checkpoint_weights.checkpoint_folders(runs[0])
    assert [step for step, _ in steps] == [10, 20]
    whole = checkpoint_weights.adapter_weights(steps[1][1])
    assert all(
        torch.equal(whole[n.replace(".weight", ".default.weight")], v.flatten()) for n, v in saved.items()
    ) and len(whole) == len(saved)
    samples = context.users(6)
    scored = dict(amplification.score_steps(context, samples))
    assert np.allclose(
        scored[20], context.scores([s.history for s in samples], "scores"), atol=1e-4
    )  # the merged adapter
    assert np.allclose(scored[0], context.base().scores([s.history for s in samples], "scores"))
    assert np.abs(scored[10] - scored[20]).max() > 1e-3 < np.abs(scored[10] - scored[0]).max()
    model = context.variant(subject.recommender.adapter, merge=False).loaded.model
    with pytest.raises(UserError, match="differ in 1 weights"):
        checkpoint_weights.set_adapter(model, {n: v for n, v in whole.items() if n != sorted(whole)[0]})
    torn = {
        n: v
        for n, v in load_file(steps[0][1] / "rank_00001.safetensors").items()
        if not n.endswith("layers.0.self_attn.v_proj.lora_A.default.weight")
    }
    keys = sorted(k for k in torn if k.startswith("model.") and k.endswith("|weight"))
    torn[keys[0].replace("|", "|1", 1)] = torn.pop(keys[0])
    durable.save_tensors(torn, steps[0][1] / "rank_00001.safetensors")
    with pytest.raises(UserError, match="do not join"):
        checkpoint_weights.adapter_weights(steps[0][1])
    assert [step for step, _ in checkpoint_weights.checkpoint_folders(runs[0])] == [
        20
    ]  # its checksum no longer holds


def test_title_log_probabilities_equal_a_plain_forward_and_the_control_knows_no_titles(subject):
    context = AuditContext(subject, Runtime(), OPTIONS)
    prompt, title = content_free_prompt(context), title_tokens(context)[3]
    with torch.no_grad():
        logits = (
            context.base()
            .recommender.loaded.model(input_ids=torch.tensor([prompt + title]))
            .logits[0]
            .double()
        )
    expected = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)[
        torch.arange(len(title)), torch.tensor(title)
    ].sum()
    assert title_log_probs(context, "base")[3] == pytest.approx(float(expected), abs=1e-4)
    control = title_log_probs(context, "random")
    assert not np.allclose(control, title_log_probs(context, "base"), atol=0.1) and np.array_equal(
        control, title_log_probs(context, "random")
    )


def test_runs_are_compared_without_a_model_and_identical_runs_differ_by_nothing(runs, tmp_path, capsys):
    audit_runs(["cross_tuning", *map(str, runs), "--output", str(tmp_path)])
    found = json.loads((tmp_path / "cross_tuning.json").read_text())
    assert {row[0] for row in found["table"]["rows"]} == {"objective", "seed"} and "<svg" in (
        tmp_path / "cross_tuning.html"
    ).read_text()
    audit_runs(["debiasing", *map(str, runs[:3]), "--output", str(tmp_path)])
    found = json.loads((tmp_path / "debiasing.json").read_text())
    assert found["table"]["columns"][1] == "sft-0 (baseline)" and len(found["measures"]) == 2
    same = debiasing.z_scores(*[debiasing.badness(folders.load_evaluations([runs[0]], 1)[0])] * 2)
    assert len(same) > 5 and set(same.values()) == {0.0}


def test_a_run_with_less_bias_everywhere_scores_better_and_flipped_signs_do_not():
    def figure(value, direction):
        ends = {"ci_low": value - 0.02, "ci_high": value + 0.02}
        return {"value": value, **ends, "higher_is_better": direction}

    def run(shift):
        metrics = {
            "mgu@5": figure(0.3 - shift, False),
            "gini@10": figure(0.8 - shift, False),
            "coverage@10": figure(0.2 + shift, True),
            "arp@10": figure(5, None),
            "aplt@10": figure(0.1 + shift, None),
        }
        return folders.Evaluation(
            None, "x", {"metrics": metrics, "floors": {"targets": {"aplt@10": {"value": 0.5}}}}
        )

    z = debiasing.z_scores(debiasing.badness(run(0.1)), debiasing.badness(run(0.0)))
    assert set(z) == {"mgu@5", "gini@10", "coverage@10", "aplt@10"} and all(
        v == pytest.approx(-0.1 / (0.04 / 3.92 * 2**0.5)) for v in z.values()
    )


def test_a_measure_without_a_spread_over_users_is_no_bias_that_went_down():
    """An interval without width, as coverage had, would make any difference an infinite number of errors."""
    width = {"mgu@5": 0.02, "coverage@10": 0.0}
    metrics = {
        name: {"value": 0.2, "ci_low": 0.2 - half, "ci_high": 0.2 + half, "higher_is_better": False}
        for name, half in width.items()
    }
    assert set(debiasing.badness(folders.Evaluation(None, "x", {"metrics": metrics}))) == {"mgu@5"}


def evaluated(folder: Path, trained: str | None, configured: str, seed: int, shift: float) -> str:
    """An evaluation folder of a run, or of a run's base model where nothing is trained."""
    ends = {"ci_low": 0.2 - shift, "ci_high": 0.4 - shift, "higher_is_better": False}
    names = ("mgu@5", "gini@10", "arp@10")
    key = {"model": "m", "adapter": "" if trained is None else f"{trained} {seed}"}
    results = {
        "format": folders.FORMAT,
        "name": folder.name if trained else f"{folder.name} (base)",
        "objective": trained,
        "config": {"objective": configured, "train": {"seed": seed}},
        "metrics": {name: {"value": 0.3 - shift * place, **ends} for place, name in enumerate(names, 1)},
        "scoring_key": key,
    }
    path = folder / "eval" / ("test" if trained else "test-base")
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results))
    return str(path)


def test_a_base_model_is_never_the_baseline_that_was_trained_with_sft(tmp_path):
    base = evaluated(tmp_path / "sft", None, "sft", 0, 0.05)
    tuned = evaluated(tmp_path / "tuned", "sft", "sft", 0, 0.02)
    gdrt = evaluated(tmp_path / "gdrt", "gdrt", "gdrt", 0, 0.04)
    found = debiasing.compare_runs([base, gdrt, tuned], OPTIONS)
    assert found["table"]["columns"][1] == "tuned (baseline)"
    assert "sft (base): mean z" in found["finding"]
    without_sft = debiasing.compare_runs([gdrt, base], OPTIONS)
    assert without_sft["table"]["columns"][1].startswith("gdrt")


def test_a_base_model_is_a_level_of_its_own_and_counts_once(tmp_path):
    given = [evaluated(tmp_path / f"sft-{s}", "sft", "sft", s, 0.01 * s) for s in (0, 1)]
    given += [evaluated(tmp_path / f"gdrt-{s}", "gdrt", "gdrt", s, 0.1 + 0.01 * s) for s in (0, 1)]
    given += [evaluated(tmp_path / f"sft-{s}", None, "sft", s, 0.3) for s in (0, 1)]
    found = cross_tuning.compare_runs(given, OPTIONS)
    assert found["finding"].startswith("Over 5 runs")
    assert found["finding"].endswith("Repeated evaluations of a base model are left out: 1.")
    (plane,) = [figure for figure in found["figures"] if figure["kind"] == "scatter"]
    levels = [point["series"] for point in plane["points"]]
    assert levels == ["sft", "sft", "gdrt", "gdrt", "base"]
    base = folders.load_evaluations(given[4:5], 1)[0]
    assert cross_tuning.level(base, "seed") == "base", "nothing was trained with the seed of its config"
    with pytest.raises(UserError, match="3 runs are left of 4 folders"):
        cross_tuning.compare_runs([*given[:2], *given[4:]], OPTIONS)


def test_bias_vectors_keep_only_measures_that_all_runs_have_and_that_vary(runs):
    names, values = cross_tuning.bias_vectors(folders.load_evaluations(runs, 4))
    assert (
        values.shape == (4, len(names)) and "audit: sensitivity" in names and np.ptp(values, axis=0).min() > 0
    )
