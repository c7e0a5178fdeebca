"""A study's grid: one definition of cells for the runner, for workers and for Slurm. Nothing is trained."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eval.study.blocks import audit_value
from eval.study.reading import Grid
from gdrt_ds.errors import UserError
from gdrt_ds.studies.grid import cells_of, choose_cells, load_study
from gdrt_ds.studies.runner import config_of, gpu_names, shares
from tests.studies.tiny_study import ROOT, STUDY, study_file

pytestmark = pytest.mark.slow

BORROWING = """
name: tiny
config: configs/planted.yaml
seeds: [0, 1, 2]
baseline: sft
rows:
  sft: [objective=sft]
  gdrt: [objective=gdrt]
  frozen: [objective=gdrt, "dro.frozen_weights={run:gdrt}"]
settings:
  default: {rows: [sft, gdrt]}
  control: {rows: [frozen], seeds: [0, 1], borrows: {default: [sft, gdrt]}}
"""


def test_a_setting_borrows_the_runs_of_another_and_trains_none_of_them_again(tmp_path):
    study = load_study(study_file(tmp_path, BORROWING))
    cells = cells_of(study, tmp_path)
    assert [c.name for c in cells if c.setting == "control"] == [
        "control-frozen-seed0",
        "control-frozen-seed1",
    ]
    frozen = next(c for c in cells if c.name == "control-frozen-seed1")
    assert frozen.needs == ("default-gdrt-seed1",)
    assert f"dro.frozen_weights={tmp_path}/runs/default-gdrt-seed1" in frozen.overrides
    rows = [{"name": c.name, "row": c.row, "setting": c.setting, "seed": c.seed} for c in cells]
    beside = Grid(study.model_dump(), rows, []).cells_of("control")
    assert sorted(c["name"] for c in beside) == sorted(
        [
            "control-frozen-seed0",
            "control-frozen-seed1",
            "default-sft-seed0",
            "default-sft-seed1",
            "default-gdrt-seed0",
            "default-gdrt-seed1",
        ]
    ), "seed 2 has nothing to stand beside"


@pytest.mark.parametrize(
    "change, words",
    [
        (("borrows: {default:", "borrows: {defualt:"), "did you mean `default`"),
        (("[sft, gdrt]}}", "[sft, gdrt]}, set: [dro.tau=2]}"), "other overrides"),
        (("seeds: [0, 1], b", "seeds: [0, 7], b"), "has no seed [7]"),
        (("rows: [frozen], ", "rows: [frozen, gdrt], "), "also trained by control"),
    ],
)
def test_what_cannot_be_borrowed_is_refused(tmp_path, change, words):
    text = BORROWING.replace(*change)
    assert text != BORROWING
    with pytest.raises(UserError) as caught:
        load_study(study_file(tmp_path, text))
    assert words in str(caught.value)


def test_a_worker_trains_what_its_cells_read_before_them(tmp_path):
    """A cell that reads another setting's run must not meet a worker that is still training it."""
    text = BORROWING.replace("  control:", "  big: {set: [dro.tau=2], seeds: [0, 1, 2]}\n  control:")
    cells = cells_of(load_study(study_file(tmp_path, text)), tmp_path)
    for workers in (1, 2, 3):
        parts = shares(cells, workers)
        assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cells)
        for part in parts:
            names = [c.name for c in part]
            for cell in part:
                assert all(needed in names[: names.index(cell.name)] for needed in cell.needs), (
                    workers,
                    cell.name,
                )


def test_a_study_reads_ratios_of_an_audit_as_logarithms():
    results = {"audits": {"language": {"measures": {"ratio": {"value": 4.0}}}}}
    assert audit_value(results, "language", "ratio", True) == 2.0
    assert audit_value(results, "language", "ratio", False) == 4.0
    assert audit_value(results, "language", "absent", True) is None
    assert audit_value({}, "language", "ratio", True) is None


def test_cells_are_rows_times_settings_times_seeds_in_a_fixed_order(tmp_path):
    text = STUDY + "settings:\n  a: []\n  b: {set: [dro.tau=2], rows: [gdrt], seeds: [5]}\n"
    study = load_study(study_file(tmp_path, text), ["train.lr=0.1"])
    cells = cells_of(study, tmp_path)
    assert [c.name for c in cells] == [
        "a-sft-seed0",
        "a-gdrt-seed0",
        "a-frozen-seed0",
        "a-sft-seed1",
        "a-gdrt-seed1",
        "a-frozen-seed1",
        "b-gdrt-seed5",
    ]
    frozen = cells[2]
    assert (
        frozen.needs == ("a-gdrt-seed0",)
        and f"dro.frozen_weights={tmp_path}/runs/a-gdrt-seed0" in frozen.overrides
    )
    assert (
        cells[6].overrides[-3:] == ("dro.tau=2", "objective=gdrt", "train.seed=5")
        and "train.lr=0.1" in cells[6].overrides
    )
    parts = shares(cells, 2)
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cells)
    one_seed = shares(cells[:3], 2)
    assert [[c.name for c in part] for part in one_seed] == [
        ["a-gdrt-seed0", "a-frozen-seed0"],
        ["a-sft-seed0"],
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (("baseline: sft", "baseline: sff"), "no row 'sff'; did you mean `sft`"),
        (("seeds:", "seed:"), "unknown key `seed`; did you mean `seeds`"),
        (("{run:gdrt}", "{run:gdr}"), "no row 'gdr'"),
        (("{run:gdrt}", "{run:frozen}"), "frozen reads the run folder of frozen, which comes later"),
        (("name: tiny", "name: a b"), "name = 'a b'"),
    ],
)
def test_mistakes_in_a_study_file_are_named(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load_study(study_file(tmp_path, STUDY.replace(*change)))
    assert message in str(caught.value)


def test_a_setting_must_hold_the_rows_that_its_rows_read(tmp_path):
    study = load_study(study_file(tmp_path, STUDY + "settings: {a: {rows: [sft, frozen]}}\n"))
    with pytest.raises(UserError, match="reads the run folder of gdrt, which the setting leaves out"):
        cells_of(study, tmp_path)


def test_pieces_choose_cells_and_unknown_ones_are_refused(tmp_path):
    study = load_study(study_file(tmp_path, STUDY + "pieces: {first: {rows: [sft], seeds: [1]}}\n"))
    cells = cells_of(study, tmp_path)
    assert [c.name for c in choose_cells(study, cells, "first")] == ["sft-seed1"]
    with pytest.raises(UserError, match="did you mean `first`"):
        choose_cells(study, cells, "frist")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_studies_hold_valid_run_configs(path, tmp_path):
    study = load_study(path)
    cells = cells_of(study, tmp_path)
    assert len({c.name for c in cells}) == len(cells) and all(
        config_of(study, tmp_path, cell).objective for cell in cells
    )
    for piece in study.pieces:
        assert choose_cells(study, cells, piece)


def test_slurm_numbers_the_same_cells(tmp_path):
    path = study_file(tmp_path)
    study = load_study(path)
    cells = cells_of(study, tmp_path)
    command = [sys.executable, str(ROOT / "slurm" / "grid.py"), "--study", str(path), "--into", str(tmp_path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[1] for line in listed] == [str(tmp_path / "runs" / c.name) for c in cells]
    words = subprocess.run([*command, "--index", "2"], capture_output=True, text=True, check=True).stdout
    assert (
        words.startswith("--config configs/planted.yaml")
        and f"run.dir={tmp_path}/runs/{cells[2].name}" in words
    )


def test_workers_share_the_gpus_that_the_study_was_given(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert gpu_names(2) == ["5", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1a")
    assert gpu_names(1) == ["GPU-8f1a"]
    assert gpu_names(0) == []
