"""What submit.py makes of lists of one value, of seeds that nobody named, and of options that need others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from gdrt_ds.errors import UserError

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "slurm"))

import chain  # noqa: E402
import checks  # noqa: E402
import grid  # noqa: E402
import submit  # noqa: E402

CONFIG = str(HOME / "configs" / "planted.yaml")


def request(*words):
    args = submit.parse(["--config", CONFIG, "--no-base", "--dry-run", *words])
    checks.check(args)
    return chain.build(args)


@pytest.mark.parametrize(
    "words, name, trained",
    [
        (["--objectives", "sft"], "sft-seed0", ["objective=sft", "train.seed=0"]),
        (["--seeds", "3"], "gdrt-seed3", ["objective=gdrt", "train.seed=3"]),
        (["--taus", "0.5"], "gdrt-tau0.5-seed0", ["objective=gdrt", "train.seed=0", "dro.tau=0.5"]),
        (["--objectives", "sft", "train.seed=7"], "sft-seed7", ["objective=sft", "train.seed=7"]),
    ],
)
def test_a_list_of_one_value_is_trained_as_it_says(tmp_path, capsys, words, name, trained):
    built = request("--into", str(tmp_path), *words)
    assert built.runs == [str(tmp_path / name)]
    job = built.job("train")
    assert (job.script, job.array) == ("sweep.sh", "0-0%4")
    assert grid.main(["--index", "0", *job.arguments]) == 0
    settings = shlex.split(capsys.readouterr().out)
    assert settings[-len(trained) - 1 :] == [*trained, f"run.dir={tmp_path / name}"]


def test_a_grid_by_hand_takes_the_seed_of_its_settings(tmp_path, capsys):
    words = ["--objectives", "sft,gdrt", "--into", str(tmp_path), "--", "--config", CONFIG, "train.seed=7"]
    assert grid.main(words) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / name) for name in ("sft-seed7", "gdrt-seed7")
    ]


def test_without_lists_it_is_one_run_in_its_own_folder(tmp_path):
    built = request(f"run.dir={tmp_path / 'run'}")
    assert built.runs == [str(tmp_path / "run")] and built.job("train").script == "gdrt.sh"


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--objectives", "sft", "run.dir=runs/x"], "run.dir=runs/x with --objectives"),
        (["--objectives", "sft,msl", "--taus", "0.5"], "none of the objectives sft, msl has a temperature"),
        (["--gpu-memory", "80"], "--gpu-memory 80 without --plan"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, problem):
    with pytest.raises(UserError, match=problem):
        request(*words)
