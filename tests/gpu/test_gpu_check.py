"""`make gpu-check` on the machine that has no GPU: its parts run at toy size, and a broken one is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdrt_ds.batches.tree_attention import TreeLayout
from tests.gpu import check, part_attention, part_four_bit, part_loss
from tests.gpu.rows import Row, Spot, at_most, same

ROOT = Path(__file__).resolve().parents[2]
CPU = Spot(torch.device("cpu"), 2, "")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "check.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_its_status_is_2(tmp_path):
    done = run("--output", str(tmp_path / "table.md"))
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU that torch can use: nothing was checked")
    assert not (tmp_path / "table.md").exists()


@pytest.mark.slow
def test_parts_of_whole_steps_and_runs_keep_their_bounds_at_toy_size(tmp_path):
    """As commands; the parts of the loss and of the 4-bit layer run in this process, in the next test."""
    output = tmp_path / "folder" / "table.md"
    done = run("--dry", "--only", "attention", "step", "run", "cards", "--output", str(output))
    table = output.read_text(encoding="utf-8")
    assert done.returncode == 0, table + done.stderr
    assert "not kept" not in table
    for part in ("attention", "step", "run", "cards"):
        assert f"\n| {part} | " in table
    assert "| step | tree attention: files that wait for the device in a step | ['buffer.py'] |" in table


@pytest.mark.parametrize("part", [part_loss, part_four_bit])
def test_every_row_of_a_part_keeps_its_bound(part):
    rows = part.run(CPU)
    assert len(rows) >= 4
    assert [row for row in rows if row.kept is False] == []


def test_an_attention_that_sees_too_much_does_not_keep_its_bound():
    layout = TreeLayout.build([20, 30])

    def one_sample(query, key, value, layout, window):
        whole = TreeLayout.build([50])
        return part_attention.whole_matrix(query, key, value, whole, window)

    (row,) = part_attention.compare(CPU, "wrong", one_sample, layout, None)
    assert row.kept is False
    (row,) = part_attention.compare(CPU, "right", part_attention.whole_matrix, layout, None)
    assert row.kept is True


def test_a_part_that_breaks_or_takes_too_long_is_a_row_that_is_not_kept():
    (row,) = check.start_part("loss", check.parse(["--dry"]), "", 0.01)
    assert row["kept"] is False
    assert row["found"] == "not finished in 0 s"
    table = check.table([row, {"part": "loss", **vars(same("a", 1, 1))}], "machine")
    assert "| loss | the part | not finished in 0 s | ends | **not kept** |" in table
    assert "| loss | a | 1 | 1 | kept |" in table


def test_figures_are_compared_with_their_bounds():
    assert at_most("x", 1.0, 1.0).kept is True
    assert at_most("x", 1.1, 1.0).kept is False
    assert at_most("x", float("nan"), 1.0).kept is False
    assert same("x", 2, 3).kept is False
    assert Row("x", "reported").kept is None
