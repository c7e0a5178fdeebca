"""A study's runner: nothing is trained twice, a broken cell does not end the others, the page adds up."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eval.study.__main__ import main as eval_study
from gdrt_ds.config import RunConfig
from gdrt_ds.errors import EXIT_INTERRUPTED, UserError
from gdrt_ds.studies import runner
from gdrt_ds.studies.grid import cells_of, load_study
from gdrt_ds.studies.keeping import keep_cell, restore_cell
from gdrt_ds.studies.runner import evaluation_of, run_of, settings_of, state_of
from gdrt_ds.study import main as run_study_command
from tests.forked import run_forked
from tests.studies.tiny_study import STUDY, study_file

pytestmark = pytest.mark.slow


def start(path: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [str(path), "--dir", str(folder), *words]
    return run_forked(run_study_command, command, folder.parent / "start")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = study_file(folder)
    first = start(path, folder / "out", "--workers", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    return path, folder / "out", first


def test_a_finished_study_has_a_run_an_evaluation_and_a_row_for_every_cell(finished):
    path, folder, _ = finished
    study = load_study(path)
    cells = cells_of(study, folder)
    assert [state_of(folder, c) for c in cells] == ["done"] * 6
    found = json.loads((folder / "study.json").read_text())
    block = found["settings"]["default"]
    assert (
        list(block["rows"]) == ["sft", "gdrt", "frozen"]
        and block["seeds"] == [0, 1]
        and found["not_evaluated"] == []
    )
    for row in block["rows"]:  # the page's values are those of the evaluations
        own = [
            json.loads(
                (
                    folder / "runs" / f"{row}-seed{s}" / "eval" / "test-renormalised" / "results.json"
                ).read_text()
            )
            for s in (0, 1)
        ]
        for metric in ("ndcg@10", "nll", "mgu@5"):
            assert block["rows"][row][metric]["value"] == pytest.approx(
                np.mean([o["metrics"][metric]["value"] for o in own]), rel=1e-9
            )
        beside = block["minus_floors"]["markov"][row]["nll"]  # and so are its differences to the floors
        theirs = [o["minus_floors"]["markov"]["nll"] for o in own]
        assert beside["difference"] == pytest.approx(np.mean([entry["value"] for entry in theirs]), rel=1e-9)
        assert (beside["ci_low"], beside["ci_high"], beside["seeds"]) == (
            min(entry["ci_low"] for entry in theirs),
            max(entry["ci_high"] for entry in theirs),
            [0, 1],
        )
    both = block["rows"]["gdrt"]
    assert (
        32 * both["nll kind=shortcut"]["value"] + 8 * both["nll kind=history"]["value"]
    ) / 40 == pytest.approx(both["nll"]["value"], rel=1e-9)
    difference = block["differences"]["sft"]["gdrt"]["nll"]
    assert difference["difference"] == pytest.approx(
        both["nll"]["value"] - block["rows"]["sft"]["nll"]["value"], abs=1e-12
    )
    assert "gdrt" in block["differences"]["frozen"] and "sft" not in block["differences"]["frozen"]
    for name in ("study.html", "study.md"):
        text = (folder / name).read_text()
        assert "frozen" in text and "NDCG@10, kind=history" in text and "against the floors" in text


def test_rows_with_fewer_seeds_take_none_from_the_others_and_pairs_share_theirs(finished, tmp_path):
    mine = tmp_path / "out"
    shutil.copytree(finished[1], mine)

    def read():
        return json.loads((mine / "study.json").read_text())["settings"]["default"]

    whole = read()
    shutil.rmtree(mine / "runs" / "frozen-seed1" / "eval")
    assert eval_study([str(mine)]) == 0
    found = read()
    assert found["seeds_of_rows"] == {"sft": [0, 1], "gdrt": [0, 1], "frozen": [0]}
    assert (
        found["rows"]["gdrt"] == whole["rows"]["gdrt"]
        and found["differences"]["sft"]["gdrt"] == whole["differences"]["sft"]["gdrt"]
    )

    def value(row, s):
        return json.loads(
            (mine / "runs" / f"{row}-seed{s}" / "eval" / "test-renormalised" / "results.json").read_text()
        )["metrics"]["nll"]["value"]

    assert found["differences"]["frozen"]["gdrt"]["nll"]["difference"] == pytest.approx(
        value("gdrt", 0) - value("frozen", 0), abs=1e-12
    )
    page = (mine / "study.md").read_text()
    assert (
        "Seeds: sft 0, 1; gdrt 0, 1; frozen 0" in page
        and "Over the seeds that both rows have: gdrt 0." in page
    )
    shutil.rmtree(mine / "runs" / "sft-seed0" / "eval")
    assert eval_study([str(mine)]) == 0
    found = read()
    assert list(found["differences"]["sft"]) == ["gdrt"] and found["seeds_of_rows"]["sft"] == [
        1
    ]  # frozen shares no seed with sft
    assert found["differences"]["sft"]["gdrt"]["nll"]["difference"] == pytest.approx(
        value("gdrt", 1) - value("sft", 1), abs=1e-12
    )
    assert any("without a run of sft of the same seed: gdrt 0, frozen 0" in note for note in found["notes"])


def test_started_again_it_trains_and_evaluates_nothing(finished):
    path, folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/**/*.json")}
    again = start(path, folder)
    assert again.returncode == 0 and "6 cells, 6 done" in again.stdout and "CPU s" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/**/*.json")} == before


def test_kept_cells_are_done_on_another_machine(finished, tmp_path):
    """Only the small files travel: nothing is trained or evaluated again, and the page is the same."""
    path, folder, _ = finished
    study = load_study(path)
    kept = tmp_path / "kept"
    for cell in cells_of(study, folder):
        settings = settings_of(study, folder, cell)
        packed = keep_cell(run_of(folder, cell), settings, evaluation_of(folder, cell), kept)
        assert packed.stat().st_size < 200_000
        assert str(folder).encode() not in b"".join(_entries(packed))
    elsewhere = tmp_path / "elsewhere"
    again = start(path, elsewhere, "--keep", str(kept))
    assert again.returncode == 0, again.stderr
    assert "6 cells, 6 done" in again.stdout and "CPU s" not in again.stdout
    assert not list(elsewhere.glob("runs/*/adapter"))
    before = json.loads((folder / "study.json").read_text())
    after = json.loads((elsewhere / "study.json").read_text())
    assert after["settings"] == before["settings"]
    assert after["totals"] == before["totals"]


def test_a_kept_cell_names_the_data_folder_of_whoever_reads_it(tmp_path):
    """Otherwise it tells its maker's folders, and elsewhere counts as trained with other settings."""
    mine, theirs = RunConfig(), RunConfig()
    mine.data.path, theirs.data.path = str(tmp_path / "my data"), "../their/data"
    run = tmp_path / "my data" / "study" / "runs" / "cell"
    evaluation = run / "eval" / "test"
    evaluation.mkdir(parents=True)
    text = "data: {path: DATA}\nrun: {dir: RUN}\n"  # the study lies in the data's folder, as it may
    (run / "config.yaml").write_text(text.replace("DATA", mine.data.path).replace("RUN", str(run)))
    (evaluation / "results.json").write_text(json.dumps({"config": {"data.path": mine.data.path}}))
    packed = keep_cell(run, mine, evaluation, tmp_path / "kept")
    assert b"my data" not in b"".join(_entries(packed))

    elsewhere = tmp_path / "elsewhere" / "runs" / "cell"
    restore_cell(packed, elsewhere, theirs)
    there = text.replace("DATA", "../their/data").replace("RUN", str(elsewhere))
    assert (elsewhere / "config.yaml").read_text() == there
    found = json.loads((elsewhere / "eval" / "test" / "results.json").read_text())
    assert found == {"config": {"data.path": "../their/data"}}


@pytest.mark.parametrize(
    "home, texts",
    [
        ("/", ["Face/Off (1997)", "/data/log.csv", "1/2"]),
        ("/me", ["/home/me", "/me-too/log.csv", "a/media", "Me/me.json", "/me.old"]),
    ],
)
def test_a_kept_cell_changes_no_text_that_is_no_path_of_its_maker(tmp_path, monkeypatch, home, texts):
    monkeypatch.setenv("HOME", home)
    run = tmp_path / "study" / "runs" / "cell"
    (run / "eval").mkdir(parents=True)
    (run / "catalogue.jsonl").write_text("\n".join(texts))
    packed = keep_cell(run, RunConfig(), run / "eval", tmp_path / "kept")
    assert _entries(packed) == ["\n".join(texts).encode()]


def test_a_kept_cell_names_no_home_folder_and_is_restored_where_home_is_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    run = tmp_path / "study" / "runs" / "cell"
    (run / "eval").mkdir(parents=True)
    text = '["/me", "/me/a.csv", "file:///me/b", "\\n/me/c", "see /me."]'
    (run / "summary.json").write_text(text)
    packed = keep_cell(run, RunConfig(), run / "eval", tmp_path / "kept")
    assert _entries(packed) == [text.replace("/me", "{home}").encode()]
    monkeypatch.setenv("HOME", "/")
    elsewhere = tmp_path / "elsewhere" / "runs" / "cell"
    restore_cell(packed, elsewhere, RunConfig())
    assert (elsewhere / "summary.json").read_text() == text.replace("/me", "")


def test_a_command_that_may_run_for_so_long_ends_with_a_checkpoint_and_goes_on(finished, tmp_path):
    """The time is up before the first step: each command takes one step, and the last one takes the rest.

    With --keep the last one also keeps its cell, as soon as that is evaluated.
    """
    path, folder, _ = finished
    study = tmp_path / "study"
    first = cells_of(load_study(path), study)[0]
    keeping = ("--keep", str(tmp_path / "kept"))
    for step in (1, 2):
        ran = start(path, study, "--cell", "0", *keeping, "run.max_minutes=0.0001")
        assert ran.returncode == EXIT_INTERRUPTED, ran.stdout + ran.stderr
        summary = json.loads((run_of(study, first) / "summary.json").read_text())
        assert summary["status"] == "interrupted" and summary["step"] == step
    assert not (tmp_path / "kept").exists()
    ran = start(path, study, "--cell", "0", *keeping)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    log = (study / "logs" / f"{first.name}.log").read_text()
    assert "interrupted by run.max_minutes: all ranks saved step 1" in log
    assert [file.name for file in (tmp_path / "kept").iterdir()] == [f"{first.name}.zip"]

    def losses(run: Path) -> list[list]:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [[s["step"], s["loss"], s["grad_norm"]] for s in steps]

    assert losses(run_of(study, first)) == losses(run_of(folder, first))


@pytest.mark.parametrize("name", ["../escape.json", "/tmp/escape.json", "adapter/weights.bin"])
def test_a_zip_that_is_no_kept_cell_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "cell.zip", "w") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(UserError, match="no kept cell"):
        restore_cell(tmp_path / "cell.zip", tmp_path / "runs" / "cell", RunConfig())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("damage", ["first bytes", "later bytes", "unknown compression", "encrypted"])
def test_a_damaged_kept_cell_is_refused_and_leaves_no_run_behind(tmp_path, damage):
    """Half of a run folder would count as trained."""
    run = tmp_path / "study" / "runs" / "cell"
    evaluation = run / "eval" / "test-renormalised"
    evaluation.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {}\n")
    (run / "summary.json").write_text(json.dumps({"status": "completed"}))
    (evaluation / "results.json").write_text(json.dumps({"rows": list(range(3000))}))
    packed = keep_cell(run, RunConfig(), evaluation, tmp_path / "kept")
    with zipfile.ZipFile(packed) as archive:
        last = archive.infolist()[-1]
    content = bytearray(packed.read_bytes())
    data = last.header_offset + 30 + len(last.filename)
    entry = content.rindex(b"PK\x01\x02")  # of the same file in the list at the end
    if damage == "first bytes":
        content[data + 4 : data + 9] = b"\xff" * 5  # the properties of LZMA
    elif damage == "later bytes":
        content[data + 40] ^= 0xFF
    elif damage == "unknown compression":
        content[entry + 10] = 97
    else:
        content[entry + 8] |= 1
        content[last.header_offset + 6] |= 1
    packed.write_bytes(content)

    elsewhere = tmp_path / "elsewhere" / "runs" / "cell"
    with pytest.raises(UserError, match="is damaged") as refused:
        restore_cell(packed, elsewhere, RunConfig())
    assert "remove it" in refused.value.fix
    assert not elsewhere.exists() and not list(elsewhere.parent.iterdir())


def test_a_kept_cell_is_not_unpacked_over_other_files(tmp_path):
    run = tmp_path / "study" / "runs" / "cell"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("train: {}\n")
    packed = keep_cell(run, RunConfig(), run / "eval", tmp_path / "kept")
    other = tmp_path / "elsewhere" / "runs" / "cell"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="cannot be unpacked") as refused:
        restore_cell(packed, other, RunConfig())
    assert f"remove {other}" in refused.value.fix
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


def _entries(packed: Path) -> list[bytes]:
    with zipfile.ZipFile(packed) as archive:
        return [archive.read(entry) for entry in archive.infolist()]


def test_other_settings_do_not_pass_for_a_finished_run(finished):
    path, folder, _ = finished
    again = start(path, folder, "train.lr=0.1")
    assert (
        again.returncode == 2 and "was trained with other settings (train.lr: 0.003 -> 0.1)" in again.stderr
    )


def test_one_cell_alone_and_a_broken_cell_leaves_the_others_standing(finished, tmp_path):
    path, folder, _ = finished
    mine = tmp_path / "out"
    shutil.copytree(folder, mine)
    path = study_file(tmp_path)
    for name in ("gdrt-seed1", "frozen-seed0", "frozen-seed1"):
        shutil.rmtree(mine / "runs" / name)
    refused = start(path, mine, "--cell", "5")
    assert (
        refused.returncode == 2
        and "reads the run folder of gdrt-seed1, which is not trained" in refused.stderr
    )
    refused = start(path, mine, "--only", "sft-seed0,frozen-seed1")
    assert (
        refused.returncode == 2
        and "frozen-seed1 reads the run folder of gdrt-seed1, which is not trained" in refused.stderr
    )
    refused = start(path, mine, "--only", "sft-seed0,gdrt-sed1")
    assert (
        refused.returncode == 2
        and "--only gdrt-sed1: the grid has no such cell" in refused.stderr
        and "did you mean `gdrt-seed" in refused.stderr
    )
    assert "--only (nothing): the grid has no such cell" in start(path, mine, "--only", "").stderr
    assert "not allowed with argument" in start(path, mine, "--only", "a", "--cell", "1").stderr
    broken = STUDY.replace(
        "[objective=gdrt]", "[objective=gdrt, groups.num=2000]"
    )  # more groups than target tokens: found when it starts
    shutil.rmtree(mine / "runs" / "gdrt-seed0")
    shutil.rmtree(mine / "runs" / "sft-seed1")
    end = start(study_file(tmp_path, broken), mine, "--workers", "1")
    assert (
        end.returncode == 1
        and "gdrt-seed0: failed: groups.num = 2000" in end.stdout
        and "sft-seed1: trained" in end.stdout
    )
    assert "frozen-seed0: failed" in end.stdout  # it reads the run folder of a broken cell
    assert "4 of 6 cells are not evaluated yet" in (mine / "study.html").read_text()


@pytest.mark.parametrize("status", [0, EXIT_INTERRUPTED])
def test_a_study_leaves_the_process_group_of_its_trainings(tmp_path, monkeypatch, status):
    """NCCL warns at exit of a group that nobody left."""
    left = []
    monkeypatch.setattr(runner, "train_in_process", lambda *_: status)
    monkeypatch.setattr(runner.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(runner.dist, "destroy_process_group", lambda: left.append(1))
    assert runner.work(load_study(study_file(tmp_path)), tmp_path, []) == status
    assert left == [1]


@pytest.mark.parametrize("killed, other", [("KILL", 0), ("TERM", 1)])
def test_a_worker_that_a_signal_kills_fails_the_study_and_is_named(
    tmp_path, monkeypatch, capsys, killed, other
):
    """A worker out of memory is killed by the kernel; the others end well or badly."""
    script = f'case "$*" in *sft-seed0*) kill -{killed} $$;; esac; exit {other}'
    monkeypatch.setattr(runner, "module_command", lambda name: ["sh", "-c", script, name])
    study = load_study(study_file(tmp_path))
    cells = [cell for cell in cells_of(study, tmp_path) if cell.name in ("sft-seed0", "sft-seed1")]
    options = argparse.Namespace(study="tiny.yaml", overrides=[], keep=None)
    number = getattr(signal, f"SIG{killed}").value
    assert runner.run_workers(options, study, tmp_path, cells, 2) == 128 + number
    said = capsys.readouterr().out
    assert f"worker 1, which had sft-seed0, was killed by SIG{killed}" in said and "worker 2" not in said


def test_an_evaluation_that_a_signal_kills_fails_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "module_command", lambda name: ["sh", "-c", "kill -KILL $$", name])
    monkeypatch.setattr(runner, "state_of", lambda folder, cell: "trained")
    study = load_study(study_file(tmp_path))
    assert runner.work(study, tmp_path, cells_of(study, tmp_path)[:1]) > 0
    assert "the evaluation, which had sft-seed0, was killed by SIGKILL" in capsys.readouterr().out


@pytest.mark.distributed
def test_cells_of_several_ranks_train_beside_another_job_that_holds_the_launcher_port(tmp_path):
    """DeepSpeed's launcher meets at port 29500 unless told otherwise.

    A second study on the machine would fail there.
    """
    text = STUDY.replace("seeds: [0, 1]", "ranks: 2\nseeds: [0]").replace(
        "train.micro_batch=32\n", "train.micro_batch=16\n"
    )
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # taken by a job of the machine's own: as good
            other.bind(("", 29500))
            other.listen()
        done = start(study_file(tmp_path, text), tmp_path / "out", "--cell", "0")
    log = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out" / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    summary = json.loads(
        (tmp_path / "out" / "runs" / "sft-seed0" / "summary.json").read_text(encoding="utf-8")
    )
    assert (summary["status"], summary["world"]) == ("completed", 2)


def test_the_page_of_cells_run_one_by_one_and_of_a_file_that_got_a_row(finished, tmp_path):
    _, folder, _ = finished
    mine = tmp_path / "out"
    shutil.copytree(folder, mine)
    (mine / "grid.json").unlink()  # `--cell` writes none
    path = study_file(
        tmp_path, STUDY.replace("evaluate:", "  gdrt tau 3: [objective=gdrt, dro.tau=3.0]\nevaluate:")
    )
    page = start(path, mine, "--report")
    assert page.returncode == 0, page.stdout + page.stderr
    assert (
        "2 of 8 cells are not evaluated yet" in (mine / "study.html").read_text()
        and "gdrt-tau-3-seed1" in (mine / "study.html").read_text()
    )
