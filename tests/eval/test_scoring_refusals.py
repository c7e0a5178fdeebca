"""What `python -m eval.run` refuses: what does not belong together, wrong options."""

import json
import shutil

import pytest

from eval.audit.__main__ import main as audit_runs
from eval.run import main as evaluate
from eval.study.__main__ import main as eval_study
from gdrt_ds.data.catalogue import Catalogue
from tests.eval.run_folders import TINY, fails, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("scoring") / "run")


def test_wrong_adapters_are_refused(run, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    zero = tmp_path / "zero"
    shutil.copytree(run, zero)
    weights = load_file(zero / "adapter" / "adapter_model.safetensors")
    save_file(
        {k: w * 0 if "lora_B" in k else w for k, w in weights.items()},
        zero / "adapter" / "adapter_model.safetensors",
    )
    assert "lora_B matrices are zero" in fails(capsys, ["--run", zero])
    save_file(
        {k.replace("layers.", "blocks."): w for k, w in weights.items()},
        zero / "adapter" / "adapter_model.safetensors",
    )
    assert "does not have" in fails(capsys, ["--run", zero])
    save_file(
        {k: w * float("nan") for k, w in weights.items()}, zero / "adapter" / "adapter_model.safetensors"
    )
    assert "NaN" in fails(capsys, ["--run", zero])
    shutil.rmtree(zero / "adapter")
    assert "has no adapter yet" in fails(capsys, ["--run", zero])


def test_another_base_model_or_tokenizer_is_refused(run, tmp_path, capsys):
    other = make_run(tmp_path / "other", ["train.seed=5"])
    assert "whose weights differ" in fails(
        capsys, ["--model", other / "base", "--adapter", run / "adapter", "--data", "planted", TINY[1]]
    )
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    tokenizer = json.loads((folder / "adapter" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "adapter" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "differs from the base model's" in fails(capsys, ["--run", folder])


def test_catalogues_that_do_not_fit_the_data_are_refused(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    catalogue = Catalogue.load(folder / "catalogue.jsonl")
    Catalogue(catalogue.entries[:-3]).save(folder / "catalogue.jsonl")
    assert "3 items of the test split are not in the catalogue" in fails(capsys, ["--run", folder])
    Catalogue(catalogue.entries[:1]).save(folder / "catalogue.jsonl")
    assert "nothing to rank" in fails(capsys, ["--run", folder])


def test_empty_splits_and_wrong_options_are_refused(run, tmp_path, capsys):
    assert "split=valid" in fails(
        capsys,
        [
            "--run",
            run,
            "--split",
            "valid",
            "data.planted={num_items: 24, num_train: 200, num_valid: 0, num_test: 40}",
        ],
    )
    assert "either --run or --model" in fails(capsys, [])
    assert "exclude each other" in fails(capsys, ["--run", run, "--model", run / "base"])
    assert "needs --data" in fails(capsys, ["--model", run / "base"])
    assert "--limit 0" in fails(capsys, ["--run", run, "--limit", 0])
    assert "--k 0" in fails(capsys, ["--run", run, "--k", 0])
    assert "does not exist" in fails(capsys, ["--run", tmp_path / "nowhere"])
    assert "lacks config.yaml" in fails(capsys, ["--run", tmp_path])
    assert "prompt template" in fails(
        capsys, ["--model", run / "base", "--data", "planted", "--prompt", "none.json"]
    )


@pytest.mark.parametrize(
    "given, least",
    [
        (("--bootstrap", 0), 20),
        (("--bootstrap", -1), 20),
        (("--permutations", 0, "--audit", "position"), 2),
        (("--permutations", 1, "--audit", "position"), 2),
        (("--audit-users", 0, "--audit", "sensitivity"), 2),
        (("--audit-users", 1, "--audit", "sensitivity"), 2),
        (("--limit", 0), 1),
        (("--limit", -3), 1),
        (("--max-nodes", 0, "--mode", "best_first"), 1),
        (("--batch-size", 0), 1),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_before_anything_is_scored(
    run, tmp_path, capsys, given, least
):
    message = fails(capsys, ["--run", run, "--output", tmp_path / "out", *given])
    assert f"{given[0]} {given[1]} is too small" in message and f"give at least {least}" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, fix",
    [
        (["--scoring", "full"], "--scoring full contradicts --mode renormalised"),
        (["--objective", "full"], "--scoring full contradicts --mode renormalised"),
        (["--mode", "full", "--scoring", "renormalised"], "--scoring renormalised contradicts --mode full"),
    ],
)
def test_a_scoring_that_an_exact_mode_contradicts_is_refused(run, tmp_path, capsys, given, fix):
    message = fails(capsys, ["--run", run, "--output", tmp_path / "out", *given])
    assert fix in message and f"use --mode {given[-1]}" in message
    assert not (tmp_path / "out").exists()


def test_a_length_penalty_is_a_finite_number(run, tmp_path, capsys):
    message = fails(capsys, ["--run", run, "--mode", "beam", "--length-penalty", "nan"])
    assert "--length-penalty nan is no finite number" in message


def test_studies_and_audits_over_runs_refuse_too_few_resamples(tmp_path, capsys):
    assert eval_study([str(tmp_path), "--num-bootstrap", "0"]) == 2
    assert "--num-bootstrap 0 is too small" in capsys.readouterr().err
    assert "--bootstrap 0 is too small" in fails(
        capsys, ["debiasing", tmp_path, "--bootstrap", 0], audit_runs
    )


def test_all_audits_of_one_user_are_left_out_and_the_evaluation_is_written(run, tmp_path, capsys):
    output = tmp_path / "all"
    few = ["--run", str(run), "--limit", "1", "--bootstrap", "20", "--no-floors"]
    evaluate([*few, "--audit", "all", "--output", str(output)])
    printed = capsys.readouterr().out
    reason = "it has 1 user(s) of the test split to look at, and needs at least 2 (raise --limit (it is 1)"
    for name in ("sensitivity", "titles", "shift"):
        assert f"audit {name}: left out of `all`: {reason}" in printed
    results = json.loads((output / "results.json").read_text())
    assert results["audits"] == {} and results["metrics"]["nll"]["n"] == 1


@pytest.mark.parametrize("name", ["titles", "position"])
def test_an_audit_that_is_named_and_lacks_users_is_refused_before_anything_is_scored(
    run, tmp_path, capsys, name
):
    given = ["--run", run, "--limit", 1, "--audit", name, "--output", tmp_path / "out"]
    message = fails(capsys, given)
    assert f"--audit {name}: " in message and "fix: raise --limit (it is 1)" in message
    assert not (tmp_path / "out").exists()
