"""The wheel alone: in an empty environment, in a folder where the user has an `eval/` and a `config.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
from clean_site import ROOT, make_site

pytestmark = pytest.mark.slow

FEW = ("train.max_steps=2", "data.planted={num_train: 96, num_test: 24}", "train.eval_every=2")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def run(site):
    """The run folder of a training with a preset config, from the user's folder."""
    text = site.run("gdrt-train", "--config", "configs/planted.yaml", *FEW, "run.dir=runs/first")
    assert "imported from the working folder" not in text
    return site.folder / "runs" / "first"


def test_the_wheel_holds_the_packages_the_presets_and_nothing_of_the_tests(site):
    with zipfile.ZipFile(site.wheel) as archive:
        names = set(archive.namelist())
    for folder in ("configs", "ds_configs", "slurm"):
        tracked = {
            str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.*") if "__pycache__" not in p.parts
        }
        assert {f"gdrt_ds/presets/{name}" for name in tracked} <= names
    assert "gdrt_ds/py.typed" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"gdrt_ds", "eval"}


def test_the_installed_package_is_the_one_that_is_imported(site):
    ask = "import sys; sys.path.remove(''); import gdrt_ds, eval; print(gdrt_ds.__file__, eval.__file__)"
    where = site.run("python", "-c", ask)
    assert where.count(str(site.environment)) == 2


def test_a_preset_config_trains_from_any_folder(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["git_hash"] is None  # not the commit of whatever repository the environment lies in
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_trained_run_is_evaluated_compared_and_asked_for_recommendations(site, run):
    site.run(
        "gdrt-eval", "--run", "runs/first", "--limit", "8", "--bootstrap", "100", "--output", "evaluated"
    )
    assert (
        json.loads((site.folder / "evaluated" / "results.json").read_text())["metrics"]["ndcg@10"]["n"] == 8
    )
    title = json.loads((run / "catalogue.jsonl").read_text().splitlines()[0])["text"]
    text = site.run("gdrt-recommend", "--run", "runs/first", "--history", title, "--k", "3", "--json")
    line = next(line for line in text.splitlines() if line.startswith("{"))
    assert [row["rank"] for row in json.loads(line)["recommendations"]] == [1, 2, 3]


def test_the_users_own_config_stands_before_a_preset_of_that_name(site):
    own = site.folder / "configs" / "smoke.yaml"
    own.parent.mkdir(exist_ok=True)
    own.write_text("objective: msl\n")
    ask = "from gdrt_ds import load_config; print(load_config('configs/smoke.yaml').objective)"
    assert site.run("python", "-c", "import sys; sys.path.remove(''); " + ask).strip() == "msl"
    own.unlink()
    assert site.run("python", "-c", "import sys; sys.path.remove(''); " + ask).strip() == "gdrt"


def test_a_config_that_is_nowhere_is_answered_with_those_that_exist(site):
    text = site.run("gdrt-train", "--config", "configs/smok.yaml", "--plan", status=2)
    assert "did you mean `configs/smoke.yaml`?" in text and "configs/llama3_8b.yaml" in text


def test_an_evaluation_says_which_eval_it_is(site):
    folder = next(site.environment.glob("lib/python3*/site-packages")) / "eval"
    assert str(folder) in site.run("gdrt-eval", "--version")
    # Also where the user has put the working folder on the path.
    assert str(folder) in site.run("gdrt-eval", "--version", PYTHONPATH=str(site.folder))


def test_the_doctor_finds_a_machine_on_which_the_wheel_can_train(site):
    text = site.run("gdrt-doctor", "--json")
    said = json.loads(text[text.index("{") :])  # libraries warn on stderr before it
    assert said["ready"] and not said["machine"]["gdrt_ds"]["checkout"]


def test_a_starter_config_for_the_users_table_is_accepted(site):
    rows = [f"{user},{item},Title {item},{100 * user + item}" for user in range(30) for item in range(6)]
    (site.folder / "log.csv").write_text("\n".join(["user_id,asin,title,date", *rows]) + "\n")
    assert "item = asin" in site.run("gdrt-init", "log.csv")
    text = site.run("gdrt-train", "--config", "gdrt.yaml", "model.path=tiny-random", "--plan")
    assert "6 titles" in text


def test_slurm_scripts_out_of_the_wheel_use_the_installed_package(site):
    site.run("gdrt-init", "--slurm")
    source = "GDRT_HOME=$PWD; set -euo pipefail; . slurm/common.sh; "
    ask = source + 'echo "${TRAINER[@]} $DEFAULT_CONFIG ${PYTHONPATH-}"'
    done = subprocess.run(
        ["bash", "-c", ask], cwd=site.folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert done.stdout.decode().split() == ["-m", "gdrt_ds.train", "configs/quickstart.yaml"], done.stderr
    words = ["look", "--", "--config", "configs/quickstart.yaml", "run.dir=runs/slurm"]
    assert "VERDICT" in site.run("python", "slurm/lives.py", *words, PYTHONSAFEPATH="1")
    assert "gdrt" in site.run(
        "python", "slurm/grid.py", "--objectives", "sft,gdrt", "--seeds", "0", PYTHONSAFEPATH="1"
    )


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_the_quickstart_out_of_the_wheel_runs_our_evaluation(site):
    ask = (
        "import sys; sys.path.remove(''); from pathlib import Path; "
        "from gdrt_ds.studies.quickstart_runs import show; "
        "show([sys.executable, '-m', 'eval.run', '--version'], Path('quickstart.log'))"
    )
    assert str(site.environment) in site.run("python", "-c", ask)


@pytest.mark.distributed
def test_ranks_that_the_command_starts_do_not_import_from_the_working_folder(site):
    """With the working folder on PYTHONPATH, where DeepSpeed's multi-node launcher puts it."""
    words = ["--num_gpus", "2", "--config", "configs/planted.yaml", *FEW, "train.micro_batch=16"]
    text = site.run("gdrt-train", *words, "run.dir=runs/ranks", PYTHONPATH=str(site.folder))
    assert "imported from the working folder" not in text
    assert json.loads((site.folder / "runs" / "ranks" / "summary.json").read_text())["status"] == "completed"
