"""Publication, verification, retention and fencing of checkpoints, on files (engines.

Tests/distributed/test_checkpoint_ranks.py).
"""

import json
import shutil

import pytest
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.training import checkpoint, durable, lives
from gdrt_ds.training.engine_state import export_rng, import_rng


def publish(run, step, life=1, keep=9, best_step=None, content=b"weights"):
    folder = run / "checkpoints"
    scratch = folder / f".step_{step}.life_{life}"
    (scratch / "deepspeed").mkdir(parents=True)
    (scratch / "rank_00000.safetensors").write_bytes(content * 100)
    (scratch / "deepspeed" / "states.pt").write_bytes(b"x" * 10)
    about = {
        "format": checkpoint.FORMAT,
        "step": step,
        "world": 1,
        "life": life,
        "fingerprint": "f",
        "stage": 3,
    }
    checkpoint._publish(run, scratch, folder / f"step_{step}", about, keep, best_step)
    return folder / f"step_{step}"


@pytest.fixture
def run(tmp_path):
    lives.begin_life(tmp_path)
    return tmp_path


def test_the_newest_checkpoint_is_found_and_latest_names_it(run):
    publish(run, 9)
    newest = publish(run, 10)
    assert checkpoint.find_latest_valid(run) == newest
    assert (run / "checkpoints" / "latest").read_text() == "step_10"


def _flip(path):
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage, words",
    [
        (_flip, "differs from its checksum"),
        (lambda p: (p / "rank_00000.safetensors").write_bytes(b"short"), "has 5 bytes instead of 700"),
        (lambda p: (p / "deepspeed" / "states.pt").unlink(), "is missing"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest"),
        (
            lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text()[:40]),
            "manifest is not readable",
        ),
        (
            lambda p: (p / "manifest.json").write_text(
                (p / "manifest.json").read_text().replace('"world": 1', '"world": 2')
            ),
            "its own digest",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_in_words(run, damage, words):
    older = publish(run, 1)
    damage(publish(run, 2))
    found, notes = checkpoint.search_valid(run)
    assert found == older
    assert len(notes) == 1 and notes[0].startswith("step_2 is passed over") and words in notes[0]
    with pytest.raises(UserError, match="damaged"):
        checkpoint.resolve_resume(run, str(run / "checkpoints" / "step_2"))


def test_leftovers_of_killed_saves_are_no_checkpoints_and_disappear_at_the_next_start(run):
    good = publish(run, 3)
    leftover = run / "checkpoints" / ".step_4.life_1"
    shutil.copytree(good, leftover)
    assert checkpoint.find_latest_valid(run) == good
    assert lives.begin_life(run) == 2
    assert not leftover.exists() and checkpoint.find_latest_valid(run) == good


def test_retention_keeps_the_newest_and_the_best(run):
    publish(run, 1, best_step=1)
    for step in (2, 3, 4):
        publish(run, step, keep=2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "step_1",
        "step_3",
        "step_4",
    ]


def test_the_best_stays_though_a_killed_process_could_not_name_it(run):
    publish(run, 2, best_step=2)
    publish(run, 4, best_step=2, keep=1)
    # Step 4 was published as the best, and the process ended before the file said so.
    assert (run / "checkpoints" / "best").read_text() == "step_2"
    publish(run, 6, best_step=4, keep=1)
    assert (run / "checkpoints" / "best").read_text() == "step_4"
    assert {p.name for p in (run / "checkpoints").glob("step_*")} == {"step_4", "step_6"}


def test_a_best_step_without_a_checkpoint_is_not_named(run):
    publish(run, 1, best_step=1)
    publish(run, 3, best_step=2, keep=1)
    assert (run / "checkpoints" / "best").read_text() == "step_1"


def test_a_run_folder_is_no_checkpoint_and_its_checkpoints_are_named(run, tmp_path):
    publish(run, 3)
    with pytest.raises(UserError, match="that is a run folder") as error:
        checkpoint.check_resume(tmp_path / "other", str(run))
    assert str(run / "checkpoints" / "step_3") in error.value.fix


def test_the_newest_step_is_that_of_the_newest_checkpoint(run):
    assert checkpoint.newest_step(run) == 0
    publish(run, 9)
    publish(run, 10)
    assert checkpoint.newest_step(run) == 10


def test_an_older_life_publishes_nothing(run):
    publish(run, 1)
    lives.begin_life(run)
    with pytest.raises(UserError, match="taken over by start number 2"):
        publish(run, 2, life=1)
    assert checkpoint.find_latest_valid(run).name == "step_1"


def test_a_newer_life_counts_as_newer_than_a_larger_step_of_an_abandoned_one(run):
    publish(run, 30)
    lives.begin_life(run)
    publish(run, 20, life=2)
    assert checkpoint.find_latest_valid(run).name == "step_20"


def test_a_step_reached_again_by_a_newer_life_replaces_the_old_one(run):
    publish(run, 5, content=b"damaged")
    lives.begin_life(run)
    path = publish(run, 5, life=2, content=b"renewed")
    assert (path / "rank_00000.safetensors").read_bytes().startswith(b"renewed")
    assert checkpoint.verify(path) is None
    assert [p.name for p in (run / "checkpoints").iterdir() if p.is_dir()] == ["step_5"]


def test_resume_auto_without_checkpoints_starts_anew_and_an_explicit_path_must_exist(run):
    assert checkpoint.resolve_resume(run, None) == (None, [])
    assert checkpoint.resolve_resume(run, "auto") == (None, [])
    publish(run, 7)
    assert checkpoint.resolve_resume(run, "step_7") == (run / "checkpoints" / "step_7", [])
    with pytest.raises(UserError, match="no such checkpoint") as error:
        checkpoint.resolve_resume(run, "step_8")
    assert "step_7" in error.value.fix


@pytest.mark.parametrize("operation", ["rename", "write_text", "fsync"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_that_dies_at_any_file_operation_leaves_a_valid_newest_checkpoint(
    run, monkeypatch, operation, when
):
    """Every occurrence of the operation in turn.

    What was published before must stay loadable, nothing half-written may count.
    """

    class Died(BaseException):
        pass

    original, died, target = getattr(durable, operation), True, 0
    step = 1
    publish(run, step)
    while died:
        calls = 0

        def dying(*args):
            nonlocal calls
            calls += 1
            if calls == target + 1 and when == "before":
                raise Died
            original(*args)
            if calls == target + 1:
                raise Died

        monkeypatch.setattr(durable, operation, dying)
        try:
            publish(run, step + 1, keep=2)
            died = False
        except Died:
            pass
        monkeypatch.setattr(durable, operation, original)
        found = checkpoint.find_latest_valid(run)
        assert found is not None and found.name in (f"step_{step}", f"step_{step + 1}")
        step = int(found.name.split("_")[1])
        shutil.rmtree(run / "checkpoints" / f".step_{step + 1}.life_1", ignore_errors=True)
        target += 1
    assert target >= 3


def test_client_state_goes_through_json_and_safetensors_unchanged():
    state = {
        "dro": {"q": torch.rand(3, dtype=torch.float64), "steps": 5},
        "order": [1, 2, {"deep": torch.arange(4)}],
        "none": None,
        "x": 0.1,
    }
    tensors = {}
    back = checkpoint._join(json.loads(json.dumps(checkpoint._split(state, "client", tensors))), tensors)
    assert torch.equal(back["dro"]["q"], state["dro"]["q"]) and torch.equal(
        back["order"][2]["deep"], torch.arange(4)
    )
    assert (back["dro"]["steps"], back["order"][:2], back["none"], back["x"]) == (5, [1, 2], None, 0.1)


def test_random_generators_continue_where_they_were():
    import random

    import numpy as np

    random.gauss(0, 1), np.random.standard_normal()
    saved = export_rng()

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            float(np.random.standard_normal()),
            torch.rand(2).tolist(),
        )

    expected = draw()
    draw()
    import_rng(saved)
    assert draw() == expected
