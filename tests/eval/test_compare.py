"""eval.compare: the same users or a refusal, intervals that say what they show, files and a table."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from examples import world

from eval.compare import compare_runs, load_run
from eval.compare.__main__ import main
from eval.compare.audits import audit_rows
from eval.compare.page import build_page
from eval.compare.runs import OF_ONE_NORMALISATION
from eval.compare.terminal import _table
from eval.folders import FORMAT, labels_of
from eval.metrics import evaluate
from eval.report import write_catalogue
from eval.study.blocks import statistics_of, with_groups_and_labels_of
from gdrt_ds.errors import UserError


def write_folder(folder: Path, skill: float, *, change=None, **world_options) -> Path:
    predictions, entries, _ = world(skill=skill, **world_options)
    if change:
        change(predictions, entries)
    folder.mkdir(parents=True)
    counts = {e.item_id: e.train_count + 1 for e in entries}
    found = evaluate(predictions, entries, history_item_counts=counts, num_bootstrap=20, breakdowns=False)
    (folder / "results.json").write_text(
        json.dumps(
            {
                **found,
                "format": FORMAT,
                "scoring": "renormalised",
                "objective": folder.parent.name,
                "mode": "renormalised",
                "dtype": "float32",
                "limit": None,
            }
        )
    )
    (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, predictions)) + "\n")
    write_catalogue(folder / "catalogue.jsonl", entries, counts)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [
        write_folder(root / name / "eval", skill)
        for name, skill in (("base", 0.5), ("sft", 2.5), ("gdrt", 2.52))
    ]


def loaded(folders):
    return [load_run(f, label) for f, label in zip(folders, labels_of(folders), strict=True)]


def test_values_are_those_of_the_evaluation_and_differences_are_signed_to_the_baseline(folders):
    found = compare_runs(loaded(folders), 200)
    for run in found.runs:
        for name in ("ndcg@10", "mgu@5", "nll", "gini@10"):
            assert found.samples[run.label][name].value == pytest.approx(
                run.results["metrics"][name]["value"]
            ), "metrics are not recomputed alike"
    row = found.rows["sft"]["ndcg@10"]
    assert (
        row.difference == pytest.approx(row.value - row.baseline)
        and row.difference > 0.1
        and row.verdict == "better"
    )
    assert found.rows["sft"]["nll"].verdict == "better" and found.rows["sft"]["nll"].difference < 0
    assert found.family == ["ndcg@10", "hr@10", "mrr", "nll", "mgu@5", "dgu@5", "cvar_nll"]


def test_swapping_baseline_and_run_swaps_the_words(folders):
    found = compare_runs(loaded(folders[1::-1]), 200)
    assert found.rows["base"]["ndcg@10"].verdict == "worse" and found.rows["base"]["ndcg@10"].difference < 0


def test_a_run_against_its_own_copy_spans_zero_everywhere(folders, tmp_path):
    copy = write_folder(
        tmp_path / "copy", 2.5, change=lambda predictions, _: random.Random(0).shuffle(predictions)
    )  # other line order
    found = compare_runs([load_run(folders[1], "sft"), load_run(copy, "copy")], 200)
    assert all(
        abs(row.difference) < 1e-12 for row in found.rows["copy"].values() if row.difference == row.difference
    )
    assert {row.verdict for row in found.rows["copy"].values()} <= {"interval spans zero", "not defined"}


def test_the_worst_group_of_a_comparison_is_over_the_same_targets(folders, tmp_path):
    """Two runs with the same scores, one of which was trained with other groups."""

    def regroup(predictions, _):
        order = sorted(range(len(predictions)), key=lambda i: predictions[i]["target_nll"])
        for place, index in enumerate(order):
            predictions[index]["relevance_group"] = place * 8 // len(order)

    other = write_folder(tmp_path / "other" / "eval", 2.5, change=regroup)
    runs = [load_run(folders[1], "sft"), load_run(other, "other")]
    own = [run.statistics()[0] for run in runs]
    found = compare_runs(runs, 100)
    worst = [name for name in found.metrics if "worst_relevance" in name]
    assert worst and all(abs(found.rows["other"][name].difference) < 1e-12 for name in worst)
    assert any("relevance groups differ in" in note for note in found.notes)
    assert set(own[0]) == set(own[1])  # both had groups, so nothing was left out before either
    same = compare_runs([load_run(folders[1], "sft"), load_run(folders[2], "gdrt")], 50)
    assert not any("relevance groups" in note for note in same.notes)


def shift_targets(predictions, entries):
    predictions[3]["target_id"] = next(e.item_id for e in entries if e.item_id != predictions[3]["target_id"])


def rename_item(predictions, entries):
    unused = next(
        e
        for e in entries[::-1]
        if all(e.item_id not in (*p["top_ids"], *p["history_ids"], p["target_id"]) for p in predictions)
    )
    unused.item_id, unused.merged_ids = "renamed", ["renamed"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda predictions, entries: predictions.pop(), "299 with the same user and target"),
        (shift_targets, "different test samples"),
        (rename_item, "different catalogues"),
        (lambda predictions, entries: setattr(entries[0], "train_count", 1), "different train counts"),
    ],
    ids=["a user is missing", "another target", "another catalogue", "another training split"],
)
def test_runs_over_other_users_or_catalogues_are_refused_in_words(folders, tmp_path, change, words):
    other = write_folder(
        tmp_path / "other", 2.0, change=change, **({"length": 8} if change is rename_item else {})
    )
    with pytest.raises(UserError, match=words):
        compare_runs([load_run(folders[0], "base"), load_run(other, "other")], 100)


def test_the_command_writes_page_table_and_json(folders, tmp_path, capsys):
    assert main([*map(str, folders), "--output", str(tmp_path / "out"), "--num-bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert "NDCG@10" in printed and "better" in printed
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (
        written["baseline"] == "base"
        and set(written["comparisons"]) == {"sft", "gdrt"}
        and written["comparisons"]["sft"]["ndcg@10"]["p_holm"] < 0.05
    )
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "Accuracy against disparity" in page and "<script" not in page and "sft against base" in page
    assert "| NDCG@10 ↑ |" in (tmp_path / "out" / "compare.md").read_text()


def without_labels(predictions, entries):
    for row in predictions:
        row["labels"] = {}


def another_first_label(predictions, entries):
    predictions[0]["labels"] = {"kind": "a" if predictions[0]["labels"]["kind"] == "b" else "b"}


def test_a_studys_slices_are_those_of_the_baseline(tmp_path):
    ours = loaded([write_folder(tmp_path / "ours" / "eval", 2.5)])[0]
    others = write_folder(tmp_path / "others" / "eval", 2.5, change=another_first_label)
    theirs = loaded([others])[0]

    def sliced(run):
        found = statistics_of(run, ["kind"], 50)
        return {name: figure.value for name, figure in found.items() if "kind=" in name}

    assert sliced(theirs) != sliced(ours), "the changed label shows in no figure"
    assert sliced(with_groups_and_labels_of(theirs, ours)) == sliced(ours)


@pytest.mark.parametrize(
    "change, words",
    [
        (without_labels, "other has no label for 300 of 300 samples"),
        (another_first_label, "other has another one for 1 of 300 samples"),
    ],
)
def test_slices_are_those_of_the_first_run_and_other_labels_are_noted_once(
    folders, tmp_path, capsys, change, words
):
    same = write_folder(tmp_path / "same" / "eval", 2.0)
    other = write_folder(tmp_path / "other" / "eval", 2.0, change=change)
    arguments = ["--output", str(tmp_path / "out"), "--num-bootstrap", "100"]
    assert main([str(folders[0]), str(other), *arguments]) == 0
    page = (tmp_path / "out" / "compare.md").read_text()
    assert page.count(f"slices by kind are those of base; {words}") == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert main([str(folders[0]), str(same), *arguments]) == 0
    ours = (tmp_path / "out" / "compare.md").read_text()
    assert "slices by kind are" not in ours

    def slices(text):
        return [line.replace("other", "same") for line in text.splitlines() if line.startswith("| kind = ")]

    assert len(slices(page)) == 4 and slices(page) == slices(ours), "labels change no number of a slice"


def test_the_first_sentence_groups_metrics_by_their_own_verdicts(folders):
    found = compare_runs(loaded(folders[:2]), 100)
    verdicts = {
        "ndcg@10": "better",
        "hr@10": "worse",
        "mrr": "interval spans zero",
        "nll": "too few users to say",
        "mgu@5": "not defined",
        "dgu@5": "interval spans zero",
        "cvar_nll": "interval spans zero after Holm's correction",
    }
    for name, verdict in verdicts.items():
        found.rows["sft"][name].verdict = verdict
        found.rows["sft"][name].difference = float("nan") if verdict == "not defined" else 0.0
    assert build_page(found).sections[0].paragraphs == [
        "**sft** against base: better on NDCG@10 (+0 %); worse on HR@10 (+0 %); interval spans zero for MRR "
        "(+0 %), DGU@5 (+0 %); too few users to say for Target NLL (+0 %); not defined for MGU@5; interval "
        "spans zero after Holm's correction for CVaR of NLL (+0 %)."
    ]
    for name in verdicts:
        found.rows["sft"][name].verdict = "differs"
    assert build_page(found).sections[0].paragraphs[0].startswith("**sft** against base: differs for NDCG@10")


def test_a_long_name_of_a_run_takes_no_words_from_the_other_columns_at_80_characters(capsys):
    name = "gdrt-gain-tau-0.3-seed0"
    lines = [
        ["NDCG@10 \u2191", "sft", "0.0380", "", "", ""],
        [
            "",
            name,
            "0.0320",
            "-0.0060",
            "-0.01082 to -0.00115",
            "interval spans zero after Holm's correction",
        ],
        ["", "msl", "0.0320", "-0.0060", "-0.01082 to -0.00115", "not shown after Holm's correction"],
        ["", "cvar", "0.0320", "-0.0060", "-0.01082 to -0.00115", "too few users to say"],
    ]
    columns = ["metric", "run", "value", "difference", "95 % interval", "verdict"]
    Console(width=80).print(_table("against sft", columns, lines))
    printed = capsys.readouterr().out
    shown = ("metric", "NDCG@10 \u2191", "0.0320", "-0.0060", "-0.01082 to -0.00115", "spans 0 (Holm)")
    for words in (*shown, "unclear (Holm)", "few users"):
        assert words in printed
    header = next(line for line in printed.splitlines() if "metric" in line)
    folded = [line[header.index("run") :].split(" ")[0] for line in printed.splitlines()]
    assert name in "".join(folded)


def test_the_baseline_can_be_any_of_the_folders(folders, tmp_path):
    assert (
        main(
            [
                *map(str, folders),
                "--baseline",
                str(folders[1]),
                "--output",
                str(tmp_path / "out"),
                "--num-bootstrap",
                "100",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["baseline"] == "sft"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{0}"], "nothing to compare"),
        (["{0}", "{0}"], "given twice"),
        (["{0}", "nowhere"], "cannot be read"),
        (["{0}", "{1}/.."], "give an evaluation folder; beneath it there are {1}/../eval"),
        (["{0}", "{1}", "--num-bootstrap", "5"], "--num-bootstrap is 5"),
    ],
)
def test_wrong_arguments_end_with_words_and_status_2(folders, tmp_path, capsys, arguments, words):
    assert main([*(a.format(*folders) for a in arguments), "--output", str(tmp_path / "out")]) == 2
    assert words.format(*folders) in capsys.readouterr().err


def test_a_run_that_is_not_evaluated_is_answered_with_the_command_that_does_it(folders, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    assert main([str(folders[0]), str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert f"python -m eval.run --run {tmp_path / 'run'}" in capsys.readouterr().err


def test_a_difference_in_scoring_is_noted_and_a_limit_is_called_no_result(folders, tmp_path):
    other = write_folder(tmp_path / "other", 2.0)
    results = json.loads((other / "results.json").read_text())
    (other / "results.json").write_text(json.dumps({**results, "scoring": "full", "limit": 300}))
    notes = compare_runs([load_run(folders[0], "base"), load_run(other, "other")], 100).notes
    assert (
        notes[0] == "not a result: limited to 300 samples"
        and "scoring differs: base renormalised, other full" in notes
    )


def test_nlls_of_different_scorings_are_not_compared_and_calibrated_ones_are(folders, tmp_path):
    other = write_folder(tmp_path / "other", 2.0)
    results = json.loads((other / "results.json").read_text())
    pair = [load_run(folders[0], "base"), load_run(other, "other")]
    same = compare_runs(pair, 100)
    assert {"nll", "cvar_nll"} <= set(same.family)
    (other / "results.json").write_text(json.dumps({**results, "scoring": "full"}))
    found = compare_runs([pair[0], load_run(other, "other")], 100)
    dropped = [name for name in OF_ONE_NORMALISATION if name in same.metrics]
    assert set(same.metrics) - set(found.metrics) == set(dropped) and {"nll", "cvar_nll"} <= set(dropped)
    assert [name for name in same.family if name not in dropped] == found.family
    assert any("probabilities under another scoring" in note and "cvar_nll" in note for note in found.notes)


def test_losses_are_compared_over_the_samples_that_both_runs_have_them_of(folders, tmp_path):
    """A run without a finite NLL of its hardest targets would look better than it is."""

    def lose_the_hardest(predictions, entries):
        for row in sorted(predictions, key=lambda row: -row["target_nll"])[:40]:
            row["target_nll"] = None

    broken = write_folder(tmp_path / "broken", 0.5, change=lose_the_hardest)
    runs = [load_run(folders[0], "base"), load_run(broken, "broken")]
    assert runs[1].predictions[0]["user_id"] == runs[0].predictions[0]["user_id"]
    found = compare_runs(runs, 100)
    for name in ("nll", "cvar_nll"):
        row = found.rows["broken"][name]
        assert row.difference == 0 and row.n == found.rows["broken"]["nll"].n, name
    assert found.rows["broken"]["ndcg@10"].n == len(runs[0].predictions)
    assert found.rows["broken"]["nll"].n == len(runs[0].predictions) - 40
    (note,) = [note for note in found.notes if "lack a finite NLL" in note]
    assert note.startswith(f"40 of {len(runs[0].predictions)} samples") and "base, broken" in note
    page = build_page(found)
    assert any(note in text for section in page.sections for text in section.paragraphs)


def test_other_train_histories_and_other_histories_of_samples_are_noted(folders, tmp_path):
    def lengthen(predictions, entries):
        for row in predictions[:30]:
            row["history_ids"] = [*row["history_ids"], row["history_ids"][0]]

    def rewrite_counts(folder, change):
        path = folder / "catalogue.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            change(row)
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")

    same = write_folder(tmp_path / "same", 2.0)
    other = write_folder(tmp_path / "other", 2.0, change=lengthen)
    rewrite_counts(other, lambda row: row.update(history_count=row["history_count"] + 1))
    without = write_folder(tmp_path / "without", 2.0)
    rewrite_counts(without, lambda row: row.pop("history_count"))
    runs = [load_run(folders[0], "base"), *(load_run(f, f.name) for f in (same, other, without))]
    expected = [
        "occurrences in train histories differ between base and other: their MGU and DGU are distances to "
        "different shares",
        "histories differ in 30 of 300 samples between base and other: the models were asked with other "
        "histories",
        "only base has the occurrences in train histories (history_count of its catalogue): MGU and DGU of "
        "without are distances to the shares of its train counts instead",
    ]
    found = compare_runs(runs, 100)
    assert found.notes == expected
    assert set(build_page(found).sections[-1].paragraphs) > {f"Note: {note}." for note in expected}
    assert compare_runs([runs[3], runs[0]], 100).notes == expected[2:]


def test_audits_stand_side_by_side_where_two_runs_have_them(folders, tmp_path, capsys):
    def effect(value):
        return {
            "sensitivity": {
                "effect": {
                    "name": "NLL(swapped) - NLL(true)",
                    "value": value,
                    "ci_low": value - 0.1,
                    "ci_high": value + 0.1,
                }
            }
        }

    given = []
    for name, audits in (("sft", effect(0.25)), ("gdrt", effect(0.75)), ("base", {})):
        folder = write_folder(tmp_path / name, 1.5)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "audits": audits}))
        given.append(load_run(folder, name))
    assert audit_rows(given) == [
        [
            "sensitivity",
            "NLL(swapped) - NLL(true)",
            "0.2500 [0.1500, 0.3500]",
            "0.7500 [0.6500, 0.8500]",
            "–",
        ]
    ]
    assert audit_rows(given[1:]) == [], "one run alone is nothing to compare"
    assert (
        main([*(str(r.folder) for r in given), "--output", str(tmp_path / "out"), "--num-bootstrap", "100"])
        == 0
    )
    assert "0.7500 [0.6500, 0.8500]" in capsys.readouterr().out
    assert "What the predictions hang on" in (tmp_path / "out" / "compare.html").read_text()


def test_every_column_of_the_page_is_seen_in_a_window_of_1280_pixels(folders, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium to open the page in (Debian: apt-get install chromium)")
    # sft and gdrt differ little, so that verdicts and numbers are of the longest kind.
    output = tmp_path / "out"
    main([*map(str, folders[1:]), "--output", str(output), "--num-bootstrap", "200"])
    probe = (
        "<script>onload=()=>{document.querySelectorAll('details').forEach(d=>d.open=true);"
        "document.title=[...document.querySelectorAll('.scroll')]"
        ".map(s=>s.scrollWidth-s.clientWidth).join(' ')}</script>"
    )
    page = tmp_path / "probed.html"
    written = (output / "compare.html").read_text(encoding="utf-8")
    assert "interval spans zero after Holm" in written
    page.write_text(written.replace("</body>", probe + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1000"]
    command += ["--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    hidden = [int(pixels) for pixels in re.search("<title>([^<]*)<", done.stdout)[1].split()]
    assert len(hidden) == 4 and max(hidden) == 0, f"pixels of each table beyond the page: {hidden}"
