"""groups.reference=live: groups follow the model in training. A resume takes those of the last refresh.
A refresh that cannot be made keeps them, and a checkpoint of other groups is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.distributed.launch import SMOKE, play
from tests.distributed.ranks import preload

pytestmark = pytest.mark.slow
SETTINGS = [
    "--config",
    SMOKE,
    "data.planted={num_train: 32, num_valid: 8, num_test: 8, num_items: 8}",
    "model.quantization=none",
    "groups.reference=live",
    "groups.refresh_every=2",
    "groups.num=4",
    "train.lr=0.02",
    "train.warmup_steps=0",
    "train.global_batch=16",
    "train.micro_batch=16",
    "train.max_steps=5",
    "train.eval_every=null",
    "train.save_every=1",
    "train.keep_checkpoints=5",
]


def weights(run: Path) -> list[list[float | None]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["group_weight"] for line in lines]


def tried(run: Path, *more: str, fault=None):
    """(exit status, what it said) of one rank."""
    done = play(1, [*SETTINGS, f"run.dir={run}", *more], run.parent / f"{run.name}_logs", fault)
    return done.statuses[0], done.text[-4000:]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run of five steps, whose groups were scored before steps 1, 3 and 5."""
    preload()
    run = tmp_path_factory.mktemp("live") / "run"
    status, said = tried(run)
    assert status == 0, said
    assert said.count("under `live` in") == 3, said
    return run


def test_a_resume_between_two_refreshes_has_the_groups_of_the_last_one(straight, tmp_path):
    run = tmp_path / "resumed"
    status, said = tried(run, f"resume={straight / 'checkpoints' / 'step_3'}")
    assert status == 0, said
    assert weights(run) == weights(straight)[3:]
    assert said.count("under `live` in") == 1, "only the refresh before step 5"
    for name, value in load_file(straight / "groups.safetensors").items():
        assert (value == load_file(run / "groups.safetensors")[name]).all(), name


@pytest.mark.parametrize(
    "given, told",
    [
        (["groups.num=3"], "the checkpoint's groups have num = 4, and this run's have 3"),
        (["groups.by=position"], "the checkpoint's groups have by = relevance, and this run's have position"),
        (["groups.reference=base"], "have reference = live, and this run's have base"),
    ],
)
def test_other_groups_than_those_of_the_checkpoint_are_refused(straight, tmp_path, given, told):
    status, said = tried(tmp_path / "other", f"resume={straight / 'checkpoints' / 'step_3'}", *given)
    assert status == 2 and told in said, said


def test_live_groups_do_not_take_those_of_a_run_whose_groups_were_fixed(tmp_path):
    preload()
    fixed = tmp_path / "fixed"
    status, said = tried(fixed, "groups.reference=base", "groups.num=3", "train.max_steps=1")
    assert status == 0, said
    status, said = tried(tmp_path / "live", f"resume={fixed / 'checkpoints' / 'step_1'}")
    assert status == 2 and "the checkpoint's groups have num = 3, and this run's have 4" in said, said


def test_a_refresh_whose_groups_would_be_empty_keeps_those_before(tmp_path):
    """A model that knows most tokens by heart gives them all the same loss."""
    preload()

    def from_the_second_time_on(rank: int) -> None:
        from gdrt_ds.training import grouping

        fit, times = grouping.fit_groups, []

        def fitted(section, data, values, *more):
            times.append(1)
            if len(times) > 1:
                values = values.map(lambda losses: 0 * losses)
            return fit(section, data, values, *more)

        grouping.fit_groups = fitted

    status, said = tried(tmp_path / "run", fault=from_the_second_time_on)
    assert status == 0, said
    assert said.count("groups: those of the last refresh stay, because now groups.num = 4") == 2, said
