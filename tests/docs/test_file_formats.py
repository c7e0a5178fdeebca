"""docs/file-formats.md documents exactly the keys that a real small run, evaluation and comparison write."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from eval.compare.__main__ import main as compare
from eval.run import main as evaluate
from gdrt_ds.files import REPOSITORY
from tests.forked import run_forked, train_forked

pytestmark = pytest.mark.slow

PAGE = (REPOSITORY / "docs" / "file-formats.md").read_text(encoding="utf-8")
TRAINING = (
    "model.quantization=none", "model.dtype=float32",
    "train.max_steps=2", "train.eval_every=2", "train.save_every=2",
    "data.planted={num_train: 64, num_valid: 8, num_test: 8}",
)  # fmt: skip


def documented(heading: str) -> tuple[set[str], set[str]]:
    """(keys that are always there, keys that are there under a condition) of one table of the page."""
    section = re.split(r"^#{2,3} ", PAGE.split(f"\n### {heading}\n")[1], flags=re.MULTILINE)[0]
    always, sometimes = set(), set()
    for keys, meaning in re.findall(r"^\| (`[^|]*`) \| ([^|]*)", section, re.MULTILINE):
        place = always
        if meaning.startswith("Only"):
            place = sometimes
        place.update(re.findall(r"`([^`]+)`", keys))
    assert always
    return always, sometimes


def done(process: subprocess.CompletedProcess) -> None:
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A run of two steps, two evaluations of it and their comparison."""
    top = tmp_path_factory.mktemp("formats")
    done(train_forked(top / "run", *TRAINING))
    evaluation = ["--run", str(top / "run"), "--bootstrap", "100", "--floors", "popularity,markov"]
    tuned = [*evaluation, "--output", str(top / "tuned"), "--audit", "language", "--audit-users", "4"]
    done(run_forked(evaluate, tuned, top / "logs"))
    done(run_forked(evaluate, [*evaluation, "--output", str(top / "base"), "--base"], top / "logs"))
    pair = [str(top / "base"), str(top / "tuned"), "--output", str(top / "compared")]
    done(run_forked(compare, pair, top / "logs"))
    return {name: top / name for name in ("run", "tuned", "base", "compared")}


def first_line(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8").splitlines()[0])


def check(heading: str, written: set[str], absent: set[str] = frozenset()) -> None:
    """The written keys are the documented ones; of the conditional ones `absent` are not written here."""
    always, sometimes = documented(heading)
    assert absent <= sometimes
    assert written == (always | sometimes) - absent


def test_the_files_of_training_have_the_documented_keys(folders):
    run_folder = folders["run"]
    check("metrics.jsonl", set(first_line(run_folder / "metrics.jsonl")))
    check("validation.jsonl", set(first_line(run_folder / "validation.jsonl")), {"catalogue_nll"})
    check("groups.json", set(json.loads((run_folder / "groups.json").read_text())))
    check("catalogue.jsonl", set(first_line(run_folder / "catalogue.jsonl")), {"history_count", "name"})
    check("prompt.json", set(json.loads((run_folder / "prompt.json").read_text())))
    check("summary.json", set(json.loads((run_folder / "summary.json").read_text())), {"error"})
    with safe_open(run_folder / "groups.safetensors", "np") as tensors:
        check("groups.safetensors", set(tensors.keys()))


def test_the_files_of_an_evaluation_have_the_documented_keys(folders):
    tuned = folders["tuned"]
    results = json.loads((tuned / "results.json").read_text())
    check("results.json", set(results), {"search", "precision"})
    base = json.loads((folders["base"] / "results.json").read_text())
    check("results.json", set(base), {"search", "precision"})
    assert base["audits"] == {}
    assert json.loads((tuned / "scoring.json").read_text()) == results["scoring_key"]
    assert set(results["metrics"]["ndcg@10"]) == {"value", "ci_low", "ci_high", "n", "higher_is_better"}
    check("predictions.jsonl", set(first_line(tuned / "predictions.jsonl")), {"certified", "nodes_expanded"})
    check("catalogue.jsonl", set(first_line(tuned / "catalogue.jsonl")), {"name"})
    always, _ = documented("An audit in results.json")
    assert always <= set(results["audits"]["language"])


def test_the_comparison_has_the_documented_keys(folders):
    check("compare.json", set(json.loads((folders["compared"] / "compare.json").read_text())))


def names_in_tables(section: str) -> set[str]:
    """The names in the first column of a section's tables, without those that need a setting."""
    cells = re.findall(r"^\| (`[^|]*`) \| (?!Only)", section, re.MULTILINE)
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_folders_hold_the_documented_files(folders):
    def rows(heading: str) -> set[str]:
        return names_in_tables(PAGE.split(f"\n## {heading}\n")[1].split("\n##")[0])

    def there(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if path.suffix != ".lock" and path.name[0] != "."}

    assert there(folders["run"]) == rows("Run folder")
    assert there(folders["tuned"]) == rows("Evaluation folder")
    assert there(folders["compared"]) == {"compare.md", "compare.html", "compare.json"}
    checkpoint = PAGE.split("\n### checkpoints/\n")[1].split("\n## ")[0]
    assert there(folders["run"] / "checkpoints" / "step_2") == names_in_tables(checkpoint)
    assert there(folders["run"] / "checkpoints") == {"step_2", "latest", "best"}
