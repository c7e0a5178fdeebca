"""The example of docs/method.md, "Adding an objective", does what the page says.

One file and one config line, then the real trainer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """A folder with the page's code as my_package/square.py."""
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    section = page.split("### Adding an objective", 1)[1]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    assert "my_package.square:OBJECTIVE" in code
    package = tmp_path_factory.mktemp("example") / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "square.py").write_text(code, encoding="utf-8")
    return package.parent


def run(folder: Path, example: Path, objective: str) -> list[dict]:
    command = [
        sys.executable,
        "gdrt_ds/train.py",
        "--config",
        "configs/planted.yaml",
        f"run.dir={folder}",
        f"objective={objective}",
        f"train.max_steps={STEPS}",
        f"train.eval_every={STEPS}",
        "train.micro_batch=16",
        "train.warmup_steps=0",
        "data.planted.num_test=20",
    ]
    environment = os.environ | {"PYTHONPATH": str(example), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_example_trains_and_its_objective_is_its_formula(example, tmp_path):
    ours = run(tmp_path / "square", example, "my_package.square:OBJECTIVE")
    plain = run(tmp_path / "sft", example, "sft")
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    assert plain[0]["objective"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    for row in ours:  # the logged loss is the mean of the objective's own token terms, and so is F here
        assert row["objective"] == pytest.approx(row["loss"], rel=1e-6)
    # same untrained model, same batch: the mean of l^2 / 2 is never below (mean l)^2 / 2, and not far above
    # it where all tokens are near ln V
    floor = plain[0]["loss"] ** 2 / 2
    assert floor < ours[0]["loss"] < 1.2 * floor
    validation = [
        json.loads(line)["nll"]
        for name in ("square", "sft")
        for line in (tmp_path / name / "validation.jsonl").read_text().splitlines()
    ]
    assert validation[0] != pytest.approx(validation[-1], rel=1e-6), (
        "the objective did not reach the gradient"
    )
    config = (tmp_path / "square" / "config.yaml").read_text(encoding="utf-8")
    assert "objective: my_package.square:OBJECTIVE" in config
