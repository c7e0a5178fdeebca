"""The quick start: its settings are settings of this version, its parts run what they print.

The runs themselves are minutes long (`make quickstart`); here one part runs with a budget of seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gdrt_ds.config import load_config
from gdrt_ds.files import preset_path
from gdrt_ds.quickstart import parse, print_ending
from gdrt_ds.studies.quickstart_runs import LEARNT_SETTINGS


def test_the_settings_of_the_learning_part_are_known_and_divide_its_batch():
    config = load_config(str(preset_path("configs/small_transformer.yaml")), list(LEARNT_SETTINGS))
    assert config.train.global_batch % config.train.micro_batch == 0
    assert config.data.limit_test == 1000


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--parts", "everything"])
    assert "planted" in capsys.readouterr().err


def test_the_ending_names_the_pages_of_the_parts_that_ran(capsys, tmp_path):
    print_ending(tmp_path, ["planted", "language"], {"planted sft": 1.0}, 2.0)
    said = capsys.readouterr().out
    assert f"{tmp_path}/planted-comparison/compare.html" in said
    assert f"{tmp_path}/quickstart-gdrt-eval/report.html" in said
    assert "learnt" not in said


@pytest.mark.slow
def test_a_part_trains_evaluates_and_compares(tmp_path):
    """The learning part on one rank, 6 steps instead of two passes: the same commands on the real engine."""
    short = """
import sys
from gdrt_ds import quickstart
from gdrt_ds.studies import quickstart_runs as runs
runs.LEARNT_SETTINGS += ("train.max_steps=6", "data.limit_test=20", "data.limit_valid=20")
runs.LEARNT_AUDIT = ("--audit", "sensitivity", "--audit-users", "10")
raise SystemExit(quickstart.main(["--parts", "learnt", "--dir", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", short, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    seconds = json.loads((tmp_path / "quickstart.json").read_text())
    assert {"learnt sft", "learnt eval gdrt", "learnt compare"} <= set(seconds)
    found = (tmp_path / "learnt-comparison" / "compare.json").read_text()
    assert all(word in found for word in ("sft", "gdrt", "ndcg@10", "nll_calibrated"))
