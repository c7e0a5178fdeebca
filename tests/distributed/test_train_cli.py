"""The training command as a user types it.

Launchers, run folder, adapter, plan, and one clear message for every mistake.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from gdrt_ds.config import load_config
from gdrt_ds.data.corpus import load_corpus
from tests.distributed.ranks import ROOT, free_port
from tests.distributed.scenario_mistakes import PARTS, SETTINGS
from tests.forked import run_scenario

pytestmark = pytest.mark.distributed
PUBLIC = (
    "config.yaml",
    "metrics.jsonl",
    "groups.json",
    "groups.safetensors",
    "catalogue.jsonl",
    "prompt.json",
    "summary.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/tokenizer.json",
    "checkpoints/latest",
    "checkpoints/step_6/manifest.json",
    "validation.jsonl",
)


def train(launcher: list[str], run: Path, *extra: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}",
    }
    command = [
        *launcher,
        str(ROOT / "gdrt_ds" / "train.py"),
        "--config",
        str(ROOT / "configs" / "smoke.yaml"),
        f"run.dir={run}",
        *SETTINGS,
        *extra,
    ]
    return subprocess.run(
        command, env=environment, cwd=run.parent, capture_output=True, text=True, timeout=280
    )


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("train_cli")


@pytest.fixture(scope="module")
def by_deepspeed(folder):
    """(finished process, run folder) of the README's first command, with fewer steps."""
    run = folder / "by_deepspeed"
    done = train(["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())], run)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return done, run


@pytest.fixture(scope="module")
def mistakes(folder):
    """What each wrong command printed and changed. Both parts run side by side: a command takes one core."""

    def found(part: str) -> dict:
        return run_scenario("scenario_mistakes", folder, part, timeout_s=560)

    with ThreadPoolExecutor(len(PARTS)) as pool:
        return {case: result for report in pool.map(found, PARTS) for case, result in report.items()}


def test_the_deepspeed_launcher_leaves_a_complete_run_folder(by_deepspeed):
    done, run = by_deepspeed
    assert [name for name in PUBLIC if not (run / name).is_file()] == []
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["world"] == 2
    assert summary["data_fingerprint"] == load_corpus(load_config(run / "config.yaml").data).fingerprint
    assert "launcher: deepspeed, 2 rank(s)" in done.stdout and "loading: sharded" in done.stdout
    records = lines(run)
    assert [r["step"] for r in records] == list(range(1, 7))
    assert all(len(r["group_loss"]) == 4 and r["grad_norm"] > 0 and r["tokens_per_s"] > 0 for r in records)
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_saved_config_starts_the_same_run_again(by_deepspeed):
    from gdrt_ds.config import load_config

    saved = yaml.safe_load((by_deepspeed[1] / "config.yaml").read_text())
    assert load_config(by_deepspeed[1] / "config.yaml").model_dump(mode="json") == saved


def test_peft_opens_the_adapter_on_the_plain_base_and_merging_does_not_change_scores(by_deepspeed):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = by_deepspeed[1]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32), run / "adapter"
    ).eval()
    lora_b = {name: value for name, value in model.named_parameters() if "lora_B" in name}
    assert len(lora_b) == 14 and all(bool(value.any()) for value in lora_b.values())
    ids = AutoTokenizer.from_pretrained(run / "adapter")("The user watched", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=5e-5)  # merged weights are rounded


def test_torchrun_and_plain_python_give_the_losses_of_the_deepspeed_launcher(by_deepspeed, mistakes, folder):
    """The global batch is the same on one rank (without a launcher) and on two.

    So are losses, weights and gradient norms, up to rounding.
    """
    expected = lines(by_deepspeed[1])
    torchrun = train(
        ["torchrun", "--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(free_port())],
        folder / "by_torchrun",
    )
    assert torchrun.returncode == 0, torchrun.stderr[-4000:]
    assert "launcher: torchrun, 2 rank(s)" in torchrun.stdout
    assert "launcher: python, 1 rank(s)" in mistakes["one rank"]["output"]
    for run, found in (
        ("torchrun", lines(folder / "by_torchrun")),
        ("python", mistakes["one rank"]["metrics"]),
    ):
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            for key in ("loss", "objective", "grad_norm", "lr"):
                assert a[key] == pytest.approx(b[key], rel=1e-5), (run, key, a["step"])
            assert a["group_loss"] == pytest.approx(b["group_loss"], rel=1e-5)
            assert a["group_weight"] == pytest.approx(b["group_weight"], rel=1e-5)
            assert a["group_count"] == b["group_count"]


def test_plan_prints_config_batch_arithmetic_and_memory_and_makes_no_run(mistakes):
    plan = mistakes["plan"]
    assert plan["status"] == 0 and plan["folder_made"] is False
    assert "global batch 32 = 4 ranks x 1 accumulation x micro-batch 8" in plan["output"]
    assert (
        "--- resolved config" in plan["output"]
        and "tokens per step:" in plan["output"]
        and "per rank" in plan["output"]
    )
    assert "Failed to load" not in plan["output"]  # bitsandbytes on CPUs with AVX512-BF16


@pytest.mark.parametrize(
    "case, words",
    [
        ("missing config", ["--config", "nowhere.yaml: no such file", "configs/smoke.yaml"]),
        ("unknown key", ["unknown key `dro.taus`", "did you mean `dro.tau`?"]),
        ("wrong type", ["train.lr = 'fast'", "number"]),
        ("tau not positive", ["dro.tau = 0", "greater than 0"]),
        ("unknown objective", ["gdrtt", "gdrt"]),
        ("more groups than tokens", ["groups.num = 5000"]),
        ("folder of a finished run", ["is in use: it holds a run", "resume=auto", "run.overwrite=true"]),
        ("folder with other files", ["is in use: it holds files that are not a run"]),
        (
            "overwrite of other files",
            ["holds files that are not a run; run.overwrite=true will not empty it"],
        ),
        ("folder not writable", ["not writable"]),
        ("resume with other settings", ["the settings of", "train.lr: 0.003 -> 0.5"]),
        ("resume of a missing checkpoint", ["no such checkpoint folder", "step_"]),
        ("unreadable model folder", ["empty_model"]),
        ("missing model folder", ["no_model_here"]),
        ("missing data file", ["no_data_here"]),
        ("missing deepspeed config", ["no such file", "did you mean `ds_configs/zero3.json`?"]),
        (
            "batch sizes of the two configs",
            ["train_batch_size = 64", "global batch 32 = 1 ranks x 4 accumulation x micro-batch 8"],
        ),
        (
            "micro-batch over global batch",
            ["train.micro_batch = 24 x 2 ranks = 48", "train.global_batch = 32"],
        ),
        ("more ranks than batch", ["train.global_batch = 2", "4 ranks"]),
    ],
)
def test_a_mistake_is_one_clear_message_with_exit_status_2_and_loses_nothing(mistakes, case, words):
    found = mistakes[case]
    assert found["status"] == 2, found
    assert [word for word in words if word not in found["error"]] == [], found["error"]
    assert (
        found["error"].count("error: ") == 1
        and "\n  fix: " in found["error"]
        and "Traceback" not in found["error"] + found["output"]
    )
    assert found["lost"] == []


def test_resuming_a_finished_run_does_nothing_and_succeeds(mistakes):
    found = mistakes["resume of a finished run"]
    assert found["status"] == 0 and "finished run: nothing to do" in found["output"] and found["lost"] == []


def test_overwrite_empties_a_finished_run_and_starts_at_step_one(mistakes):
    found = mistakes["overwrite of a finished run"]
    assert (
        found["status"] == 0
        and found["steps"] == [1, 2]
        and found["summary"] == "completed"
        and found["checkpoints"] == ["step_2"]
    )


def test_overwrite_with_a_mistake_in_the_data_gives_the_old_run_back(mistakes):
    found = mistakes["overwrite with a mistake"]
    assert (
        found["status"] == 2
        and "no_data_here" in found["error"]
        and found["lost"] == []
        and found["hidden"] == []
    )


def test_a_start_that_fails_in_its_data_or_model_leaves_the_folder_free_for_the_mended_command(mistakes):
    assert mistakes["unreadable model folder"]["left"] == mistakes["missing data file"]["left"] == []
