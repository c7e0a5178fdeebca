"""The validation loss among the catalogue's titles is what evaluation finds on the validation split."""

import json

import pytest

from eval.run import main as evaluate
from tests.forked import train_forked

pytestmark = pytest.mark.slow
SMALL = [
    "data.path=planted",
    "data.planted={num_train: 64, num_valid: 30, num_test: 8}",
    "model.path=tiny-random",
    "model.quantization=none",
    "model.dtype=float32",  # evaluation scores in float32; some CPUs would train in bfloat16 by themselves
    "deepspeed=ds_configs/zero1.json",
    "train.global_batch=16",
    "train.max_steps=2",
    "train.eval_every=1",
]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("settings", [["objective=msl"], ["train.select_by=catalogue_nll"]])
def test_it_is_the_loss_that_evaluation_finds(settings, tmp_path):
    done = train_forked(tmp_path / "run", *SMALL, *settings, config=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "among titles" in done.stdout
    last = lines_of(tmp_path / "run" / "validation.jsonl")[-1]
    evaluate(["--run", str(tmp_path / "run"), "--split", "valid", "--no-floors", "--bootstrap", "20"])
    found = json.loads((tmp_path / "run/eval/valid-renormalised/results.json").read_text(encoding="utf-8"))
    assert last["step"] == 2
    assert last["catalogue_nll"] == pytest.approx(found["metrics"]["nll"]["value"], rel=1e-4)


def test_rows_have_no_catalogue_to_be_selected_by(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "a", "completion": text}) + "\n" for text in ("b", "c")]
    rows.write_text("".join(lines * 20), encoding="utf-8")
    sft = [f"data.path={rows}", "data.format=sft", "train.select_by=catalogue_nll"]
    refused = train_forked(tmp_path / "run", *SMALL, *sft, config=None)
    assert refused.returncode != 0
    assert "train.select_by = catalogue_nll" in refused.stderr and "no catalogue" in refused.stderr
