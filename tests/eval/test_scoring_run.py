"""`python -m eval.run` and `gdrt_ds.recommend` on run folders and foreign models: results, restarts, ranks,
refusals.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import predictions as predictions_module
from eval.floors import choose, fit_floors
from eval.loading import load_subject
from eval.metrics.calibration import nll_curve
from eval.pipeline import _notes
from eval.predictions.options import ScoringOptions
from eval.predictions.rows import SCORE_DECIMALS
from eval.run import checked_options, main, parse, without_effect
from eval.scoring import expected_rank, per_item_scores
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.recommend import main as recommend_main
from gdrt_ds.runtime import Runtime
from tests.distributed.launch import play
from tests.distributed.ranks import preload
from tests.eval.run_folders import TINY, fails, make_run

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
FAST = ["--bootstrap", "50", "--floors", "popularity,markov"]  # sasrec has tests of its own


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("scoring") / "run")


@pytest.fixture(scope="module")
def evaluated(run):
    main(["--run", str(run), *FAST])
    return run / "eval" / "test-renormalised"


def rows(folder):
    return [
        json.loads(line)
        for line in (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_predictions_equal_an_independent_scoring_of_every_item(run, evaluated):
    subject = load_subject(Runtime(), run=str(run), merge=False)
    found = rows(evaluated)
    assert [row["sample_id"] for row in found] == [s.sample_id for s in subject.samples]
    ids = [entry.item_id for entry in subject.catalogue.entries]
    for sample, row in list(zip(subject.samples, found, strict=True))[:3]:
        recommender = subject.recommender
        scores = per_item_scores(
            recommender.loaded.model, recommender.trie, recommender.prompt_of(sample.history)
        ).numpy()
        target = subject.catalogue.index_of[sample.target]
        assert row["rank"] == expected_rank(scores, target)
        assert row["target_nll"] == pytest.approx(-scores[target], abs=1e-4)
        assert np.allclose(row["nll_at_temperatures"], nll_curve(scores, target), atol=1e-3)
        assert row["top_ids"] == [ids[i] for i in np.argsort(-scores)]
        assert row["history_ids"] == list(sample.history) and len(row["top_ids"]) == len(ids)


def test_results_name_scoring_training_objective_versions_and_floors(evaluated):
    results = json.loads((evaluated / "results.json").read_text())
    assert (
        results["scoring"] == results["mode"] == "renormalised"
        and results["objective"] == "gdrt"
        and results["dtype"] == "float32"
        and results["limit"] is None
    )
    assert set(results["floors"]) == {"popularity", "markov", "targets"}
    assert (
        results["metrics"]["ndcg@10"]["n"] == len(rows(evaluated))
        and results["versions"]["torch"] == torch.__version__
    )
    mean_nll = np.mean([row["target_nll"] for row in rows(evaluated)])
    assert results["metrics"]["nll"]["value"] == pytest.approx(mean_nll, abs=1e-9)
    assert (evaluated / "report.html").is_file() and (evaluated / "report.md").is_file()


def test_merged_and_unmerged_adapters_and_the_base_model(run, evaluated):
    scores = []
    for options in ({}, {"merge": False}, {"base": True}):
        subject = load_subject(Runtime(), run=str(run), **options)
        recommender = subject.recommender
        scores.append(
            CatalogueScorer(recommender.reader, recommender.trie).score(
                [recommender.prompt_of(s.history) for s in subject.samples[:4]]
            )
        )
    assert torch.allclose(scores[0], scores[1], atol=1e-4, rtol=0)
    assert (scores[0] - scores[2]).abs().max() > 0.05


def test_an_nf4_base_is_scored_like_its_own_per_item_scores(tmp_path):
    folder = make_run(tmp_path / "run", ["model.quantization=nf4"])
    subject = load_subject(Runtime(), run=str(folder))
    recommender, sample = subject.recommender, subject.samples[0]
    prompt = recommender.prompt_of(sample.history)
    found = CatalogueScorer(recommender.reader, recommender.trie).score([prompt])[0]
    assert torch.allclose(
        found, per_item_scores(recommender.loaded.model, recommender.trie, prompt), atol=1e-4, rtol=0
    )
    assert any("NF4" in line for line in recommender.lines)


def test_a_model_trained_elsewhere_scores_like_the_run_it_is_a_copy_of(run, evaluated, tmp_path):
    shutil.copytree(run / "base", tmp_path / "base")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copy(run / "prompt.json", tmp_path / "mine.json")
    main(
        [
            "--model",
            str(tmp_path / "base"),
            "--adapter",
            str(tmp_path / "adapter"),
            "--prompt",
            str(tmp_path / "mine.json"),
            "--data",
            "planted",
            "--output",
            str(tmp_path / "out"),
            *FAST,
            TINY[1],
        ]
    )
    for mine, theirs in zip(rows(tmp_path / "out"), rows(evaluated), strict=True):
        assert (mine["rank"], mine["top_ids"]) == (theirs["rank"], theirs["top_ids"])
        assert mine["target_nll"] == pytest.approx(theirs["target_nll"], abs=1e-6)


def strip(row: dict) -> dict:
    """A prediction without the numbers that batch sizes and ranks round differently."""
    return {**row, "target_nll": 0, "top_scores": 0, "nll_at_temperatures": 0}


def test_two_ranks_write_what_one_rank_writes(run, evaluated, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "eval.run",
        "--run-dir",
        str(run),
        "--output",
        str(tmp_path),
        *FAST,
        "--batch-size",
        "3",
    ]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [p.read_text().count("\n") for p in sorted((tmp_path / "parts").glob("rank_*.jsonl"))]
    assert parts == [20, 20]
    for mine, theirs in zip(rows(tmp_path), rows(evaluated), strict=True):
        assert strip(mine) == strip(theirs)
        assert np.allclose(mine["top_scores"], theirs["top_scores"], atol=1e-5)
        assert mine["top_scores"] == [round(score, SCORE_DECIMALS) for score in mine["top_scores"]]
        assert np.allclose(mine["nll_at_temperatures"], theirs["nll_at_temperatures"], atol=2e-4)


def test_the_former_name_of_scoring_is_taken_and_said(capsys):
    options = parse(["--run", "x", "--mode", "beam", "--objective", "full"])
    assert options.scoring == "full"
    assert capsys.readouterr().out == "--objective is called --scoring now; the former name is still read\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["--beams", "30", "--max-nodes", "9"], ["--beams (belongs to --mode beam)", "--max-nodes"]),
        (["--mode", "beam", "--beams", "30", "--length-penalty", "1"], []),
        (["--mode", "best_first", "--max-nodes", "9", "--length-penalty", "1"], ["--length-penalty"]),
        (["--audit-users", "9", "--permutations", "3", "--runs", "a"], ["--audit-users", "--perm", "--runs"]),
        (["--audit", "position", "--audit-users", "9", "--permutations", "3", "--runs", "a"], []),
        ([], []),
    ],
)
def test_options_that_change_nothing_in_an_evaluation_are_named(words, said):
    options = parse(["--run", "x", *words])
    found = without_effect(options, *checked_options(options))
    assert len(found) == len(said)
    assert all(line.startswith(name) for line, name in zip(found, said, strict=True))


def test_an_exact_evaluation_does_not_depend_on_a_limit_of_nodes(run, tmp_path, capsys):
    words = ["--run", str(run), "--output", str(tmp_path), "--limit", "4", *FAST]
    main([*words, "--max-nodes", "5"])
    printed = capsys.readouterr().out
    assert "not used: --max-nodes (belongs to --mode best_first)" in printed
    assert "scoring: 4 samples against 24 titles" in printed and "4/4 samples, " in printed
    main(words)
    printed = capsys.readouterr().out
    assert "not used" not in printed and "scoring: " not in printed, "the predictions are the same"


def test_the_report_of_a_base_model_has_no_curves_of_the_training_of_its_run(run, tmp_path):
    trained = tmp_path / "run"
    shutil.copytree(run, trained)
    log = "".join(json.dumps({"step": step, "loss": 3.0 - step}) + "\n" for step in (1, 2))
    (trained / "metrics.jsonl").write_text(log)
    for name, words in (("tuned", []), ("base", ["--base"])):
        main(["--run", str(trained), "--output", str(tmp_path / name), "--limit", "4", *FAST, *words])
        report = (tmp_path / name / "report.md").read_text(encoding="utf-8")
        assert ("## Training" in report) is (name == "tuned")


def test_the_searching_modes_agree_with_exact_ranks_where_they_give_one(run, evaluated, tmp_path):
    exact = rows(evaluated)
    for mode, options in (("best_first", ["--k", "5"]), ("beam", ["--beams", "30"])):
        main(["--run", str(run), "--mode", mode, "--output", str(tmp_path / mode), *options, *FAST])
        for mine, theirs in zip(rows(tmp_path / mode), exact, strict=True):
            assert mine["target_nll"] == pytest.approx(theirs["target_nll"], abs=1e-4)
            assert mine["top_ids"][:5] == theirs["top_ids"][:5]
            assert mine["rank"] == (theirs["rank"] if mode == "beam" or theirs["rank"] <= 5 else None)
    assert all(row["certified"] == 5 for row in rows(tmp_path / "best_first"))


def test_targets_in_the_unproven_part_of_a_list_are_counted_in_a_note(run):
    subject = load_subject(Runtime(), run=str(run), limit=3)
    lists = {"top_ids": ["a", "b", "c"], "nodes_expanded": 9}
    found = [
        {**lists, "target_id": "b", "rank": None, "certified": 1},
        {**lists, "target_id": "b", "rank": 2.0, "certified": 2},
        {**lists, "target_id": "z", "rank": None, "certified": 0},
    ]
    told = [note for note in _notes(subject, ScoringOptions("best_first"), found) if "unproven" in note]
    assert len(told) == 1 and told[0].startswith("best-first: 1 targets stand in the unproven part")
    assert not any("unproven" in note for note in _notes(subject, ScoringOptions("best_first"), found[1:]))


def test_duplicate_titles_are_one_entry_and_any_of_their_ids_is_a_hit(tmp_path):
    names = {
        str(i): title
        for i, title in enumerate(
            ["Red fox", "Blue whale", "Red  fox", "Grey &amp; white wolf", "Owl", "Owl of the north"]
        )
    }
    data = tmp_path / "data"
    data.mkdir()
    (data / "id2name4Rec.json").write_text(json.dumps(names))
    for name in ("train", "valid", "test"):
        (data / f"{name}.csv").write_text(
            "user_id,item_ids,timestamp\n"
            + "\n".join(
                f'u{i},"{[str(i % 6), str((i + 1) % 6), target]}",{i}'.replace("'", "")
                for i, target in enumerate("02450")
            )
        )
    folder = make_run(tmp_path / "run", [f"data.path={data}", "data.planted={}"])
    main(["--run", str(folder), *FAST])
    found = rows(folder / "eval" / "test-renormalised")
    catalogue = Catalogue.load(folder / "catalogue.jsonl")
    assert len(catalogue) == 5 and catalogue.index_of["0"] == catalogue.index_of["2"]
    assert {row["target_id"] for row in found} <= {entry.item_id for entry in catalogue.entries}
    assert (
        found[0]["target_id"] == found[1]["target_id"] == catalogue.entries[catalogue.index_of["2"]].item_id
    )
    assert any(entry.text == "Grey & white wolf" for entry in catalogue.entries)
    assert all(
        len(row["top_ids"]) == 5 for row in found
    )  # a title that is the beginning of another one is an item of its own


def test_the_floors_are_distributions_with_counts_by_hand(run):
    subject = load_subject(Runtime(), run=str(run))
    floors, _ = fit_floors(subject, choose("popularity,markov", subject.corpus))
    train = subject.corpus.splits["train"]
    last = train[0].history[-1]
    for floor, history in (("popularity", (last,)), ("markov", (last,)), ("markov", ())):
        assert np.exp(floors[floor].log_probs([history])).sum() == pytest.approx(1.0, abs=1e-12)
    index = subject.catalogue.index_of
    after = [index[s.target] for s in train if s.history[-1] == last]
    popular = np.array([e.train_count + 1 for e in subject.catalogue.entries], float)
    popular /= popular.sum()
    expected = (np.bincount(after, minlength=len(popular)) + popular) / (len(after) + 1)
    assert np.allclose(np.exp(floors["markov"].log_probs([(last,)])[0]), expected, atol=1e-12)


def test_nan_scores_count_as_the_worst_rank_and_are_reported(run, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {k: w * float("nan") if k == "lm_head.weight" else w for k, w in weights.items()},
        tmp_path / "base" / "model.safetensors",
        metadata={"format": "pt"},
    )
    main(
        [
            "--model",
            str(tmp_path / "base"),
            "--prompt",
            "alpaca",
            "--data",
            "planted",
            "--output",
            str(tmp_path / "out"),
            *FAST,
            TINY[1],
        ]
    )
    assert {row["rank"] for row in rows(tmp_path / "out")} == {24.0} and {
        row["target_nll"] for row in rows(tmp_path / "out")
    } == {None}
    notes = json.loads((tmp_path / "out" / "results.json").read_text())["notes"]
    assert any("40 of 40 samples have NaN scores" in note for note in notes)


def test_sampling_settings_of_instruct_models_do_not_leak_into_scores(run, evaluated, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    settings = folder / "base" / "generation_config.json"
    settings.write_text(
        json.dumps(
            {
                **json.loads(settings.read_text()),
                "do_sample": True,
                "temperature": 0.2,
                "top_k": 3,
                "repetition_penalty": 1.3,
            }
        )
    )
    main(["--run", str(folder), "--output", str(tmp_path / "out"), *FAST])
    output = capsys.readouterr().out
    assert (
        "generation_config" in output and "the catalogue has 24 items, so lists end there (--k 50)" in output
    )
    assert [r["target_nll"] for r in rows(tmp_path / "out")] == pytest.approx(
        [r["target_nll"] for r in rows(evaluated)], abs=1e-6
    )


def test_an_unsupported_architecture_is_noticed_before_scoring(run, monkeypatch):
    from gdrt_ds.inference.prompt_reader import PromptReader

    original = PromptReader.run
    monkeypatch.setattr(
        PromptReader,
        "run",
        lambda self, tokens, positions, *rest, **options: original(
            self, tokens, positions * (1 if options.get("record") else 2), *rest, **options
        ),
    )
    subject = load_subject(Runtime(), run=str(run))
    with pytest.raises(UserError, match="nats from scoring items one by one"):
        predictions_module.check_exactness(subject, predictions_module.ScoringOptions())


def test_scores_are_called_exact_only_within_a_thousandth_of_a_nat(run, tmp_path, capsys):
    for dtype, exact in (("float32", True), ("bfloat16", False)):
        output = tmp_path / dtype
        main(["--run", str(run), "--output", str(output), *FAST, f"model.dtype={dtype}"])
        printed = capsys.readouterr().out
        results = json.loads((output / "results.json").read_text())
        found = results["exactness"]
        assert found["dtype"] == dtype and found["num_items"] >= 2
        assert (found["difference_nats"] <= 1e-3) is found["exact"] is exact, found
        warned = [note for note in results["notes"] if "scores are not exact" in note]
        assert ("warning: scores are not exact" in printed) is bool(warned) is not exact
        report = (output / "report.md").read_text(encoding="utf-8")
        assert ("scores are not exact" in report) is not exact
        assert printed.index("scoring: ") < printed.index(f"{results['num_samples']}/")


def test_recommend_lists_the_most_probable_titles_and_announces_unknown_ones(run, capsys, tmp_path):
    subject = load_subject(Runtime(), run=str(run))
    recommender, titles = subject.recommender, [entry.text for entry in subject.catalogue.entries]
    capsys.readouterr()
    recommend_main(
        ["--run", str(run), "--history", f"{titles[3]}; A film of my own; {titles[1]}", "--k", "4", "--json"]
    )
    output = capsys.readouterr()
    found = json.loads(output.out.splitlines()[-1])
    assert (
        found["unknown"] == ["A film of my own"]
        and "'A film of my own' is not in the catalogue" in output.err
        and "scoring 1 history against 24 titles" in output.err
    )
    prompt = recommender.prompt_of_titles([titles[3], "A film of my own", titles[1]])
    scores = per_item_scores(recommender.loaded.model, recommender.trie, prompt)
    best = scores.argsort(descending=True)[:4].tolist()
    assert [row["title"] for row in found["recommendations"]] == [titles[i] for i in best]
    assert [row["log_prob"] for row in found["recommendations"]] == pytest.approx(
        scores[best].tolist(), abs=1e-4
    )
    (tmp_path / "histories.txt").write_text(f"{titles[0]}\n\n{titles[1]}; {titles[2]}\n")
    recommend_main(["--run", str(run), "--file", str(tmp_path / "histories.txt"), "--k", "100"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * (2 + len(titles))
    assert printed[1].split() == ["rank", "log-prob", "probability", "title"]
    assert "no title found" in fails(capsys, ["--run", run, "--history", " ; "], recommend_main)
    assert "cannot be read" in fails(capsys, ["--run", run, "--file", tmp_path / "absent"], recommend_main)


def test_audits_take_the_evaluations_own_scores_on_one_rank_and_on_two(run, tmp_path, capsys):
    words = [*FAST, "--audit", "information", "--audit-users", "12"]
    main(["--run", str(run), "--output", str(tmp_path / "one"), *words])
    assert "audit information: no model passes" in capsys.readouterr().out
    main(
        ["--run", str(run), "--output", str(tmp_path / "one"), *words]
    )  # predictions are there: nothing was scored that could be handed over
    assert "audit information: 12 exact catalogue scorings" in capsys.readouterr().out
    preload()
    done = play(
        2, ["--run", str(run), "--output", str(tmp_path / "two"), *words], tmp_path / "logs", main=main
    )
    assert done.statuses == [0, 0] and "audit information: no model passes" in done.outputs[0], done.text
    measures = [
        json.loads((tmp_path / name / "results.json").read_text())["audits"]["information"]["measures"]
        for name in ("one", "two")
    ]
    for name, found in measures[0].items():
        assert found["value"] == pytest.approx(measures[1][name]["value"], rel=1e-3, abs=1e-4), name
