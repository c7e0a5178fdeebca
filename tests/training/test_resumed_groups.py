"""A checkpoint's moving averages and weights are about its groups: other groups do not take them.

The groups of a resume are compared with those of the checkpoint, by their settings and by their tokens.
"""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from gdrt_ds.config import load_config
from gdrt_ds.training.resuming import other_order
from tests.data.sft_files import rows, write_lines
from tests.distributed.scenario_mistakes import SETTINGS as SHORT
from tests.distributed.test_train_cli import lines
from tests.forked import train_forked

SETTINGS = [
    *SHORT,
    "data.format=sft",
    "groups.by=label",
    "groups.num=8",
    "model.quantization=none",
    "train.global_batch=8",
    "train.max_steps=2",
    "train.save_every=1",
    "train.eval_every=null",
]


def write(folder, names):
    """Rows whose whole completions have one label each."""
    for seed, split in enumerate(("train", "valid")):
        found = rows(16, seed)
        for place, row in enumerate(found):
            row["group"] = names[place % 3 == 0]
        write_lines(folder / f"{split}.jsonl", found)
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(run of two steps, its data)."""
    folder = tmp_path_factory.mktemp("groups")
    data = write(folder / "data", ("often", "seldom"))
    done = train_forked(folder / "run", *SETTINGS, f"data.path={data}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return folder / "run", data


def resumed(started, folder, *more):
    """The end of a run of its own that goes on from the first step of the other."""
    first = f"resume={started[0] / 'checkpoints' / 'step_1'}"
    done = train_forked(folder / "run", *SETTINGS, f"data.path={started[1]}", first, *more)
    return done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_same_groups_go_on(started, tmp_path):
    status, said = resumed(started, tmp_path)
    assert status == 0, said
    assert lines(tmp_path / "run")[-1]["group_weight"] == lines(started[0])[-1]["group_weight"]


def test_weight_decay_is_that_of_the_settings_and_another_order_of_samples_is_told(started, tmp_path):
    for run in ("same", "other"):
        (tmp_path / run).mkdir()
    status, said = resumed(started, tmp_path / "same")
    assert status == 0 and "another order" not in said, said
    status, said = resumed(started, tmp_path / "other", "train.weight_decay=1000", "train.lr=0.0005")
    assert status == 0, said
    adapters = [
        load_file(tmp_path / run / "run/adapter/adapter_model.safetensors") for run in ("same", "other")
    ]
    sizes = [sum(float(weight.abs().sum()) for weight in adapter.values()) for adapter in adapters]
    assert sizes[1] < 0.95 * sizes[0]
    config = load_config(None, ["train.global_batch=4", "train.seed=0"])
    (told,) = other_order(config, started[0] / "config.yaml")
    assert "had train.global_batch = 8, this one has 4: it goes on at the same step of another order" in told
    assert other_order(config, tmp_path / "config.yaml") == []


@pytest.mark.parametrize(
    "given, told",
    [
        (["groups.by=position", "groups.num=2"], "the checkpoint's groups have by = label, and this run's"),
        (["groups.num=1"], "the checkpoint's groups have num = 2, and this run's have 1"),
    ],
)
def test_other_groups_are_refused(started, tmp_path, given, told):
    status, said = resumed(started, tmp_path, *given)
    assert status == 2 and told in said, said


def test_the_same_labels_on_other_rows_are_refused(started, tmp_path):
    data = shutil.copytree(started[1], tmp_path / "data")
    train_file = data / "train.jsonl"
    found = [json.loads(line) for line in train_file.read_text(encoding="utf-8").splitlines()]
    same = [place for place, row in enumerate(found) if row["completion"] == found[0]["completion"]]
    other = next(place for place in same if found[place]["group"] != found[0]["group"])
    found[0]["group"], found[other]["group"] = found[other]["group"], found[0]["group"]
    write_lines(train_file, found)
    status, said = resumed(started, tmp_path, f"data.path={data}")
    assert status == 2 and "other train tokens are in the groups than in the checkpoint" in said, said
