"""An adapter for the hub: its folder is complete, its card is right, and what hinders an upload is said."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.torch import load_file, save_file

from eval.run import main as evaluate
from gdrt_ds.config import load_config
from gdrt_ds.data.trie_file import load_trie
from gdrt_ds.errors import UserError
from gdrt_ds.export import main
from gdrt_ds.files import sha256_of
from gdrt_ds.inference import exporting
from gdrt_ds.inference.public_names import public_settings
from gdrt_ds.inference.publishing import check_upload, write_adapter
from gdrt_ds.inference.recommender import open_run
from gdrt_ds.models.weight_writer import shard_bytes
from gdrt_ds.runtime import Runtime
from tests.eval.run_folders import make_run

BASE = "HuggingFaceTB/SmolLM2-135M"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the records of a training and of an evaluation, as docs/file-formats.md has them."""
    folder = make_run(tmp_path_factory.mktemp("publishing") / "run", ["objective=gdrt", "dro.tau=0.3"])
    groups = {"by": "relevance", "counts": [70, 90], "names": ["r in [-inf, -3)", "r in [-3, inf)"]}
    (folder / "groups.json").write_text(json.dumps(groups))
    validation = [
        {"step": 10, "group_loss": [4.0, 3.0]},
        {"step": 20, "group_loss": [2.25, None]},
        {"step": 30, "group_loss": [9.0, 9.0]},
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validation))
    summary = {
        "adapter_step": 20,
        "data_fingerprint": "da7a",
        "base_fingerprint": "ba5e",
        "dtype": "float32",
        "samples": 640,
        "versions": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    figure = {"value": 0.25, "ci_low": 0.2, "ci_high": 0.3, "n": 40}
    results = {
        "metrics": {"ndcg@10": figure, "nll": figure | {"value": 3.5}, "mrr": figure | {"value": None}},
        "breakdowns": {
            "relevance_group": {"groups": {"0": {"ndcg@10": figure, "nll": figure | {"value": 4.5}}}}
        },
        "audits": {"popularity": {"title": "Popularity", "finding": "Lists are twice as popular."}},
        "split": "test",
        "num_samples": 40,
        "num_items": 24,
        "scoring_key": {
            "limit": None,
            "adapter": sha256_of(folder / "adapter" / "adapter_model.safetensors"),
        },
    }
    (folder / "eval").mkdir()
    (folder / "eval" / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def published(run):
    folder = run.parent / "published"
    done = write_adapter(run, folder, BASE, "owner/films")
    assert done["base"] == BASE and done["catalogue"].startswith("catalogue of 24 titles")
    return folder


def test_the_folder_is_complete_and_peft_loads_it(run, published):
    names = {path.name for path in published.iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "catalogue.jsonl",
        "catalogue_trie.safetensors",
        "prompt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    opened = open_run(run, Runtime(), merge=False)
    base = open_run(run, Runtime(), base=True).loaded.model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, published).eval()(input_ids=ids).logits
        assert torch.equal(found, opened.loaded.model(input_ids=ids).logits)
    assert load_trie(published).num_nodes == opened.trie.num_nodes


def test_the_front_matter_says_base_task_and_figures_as_the_hub_reads_them(published):
    data = ModelCard.load(published / "README.md").data
    told = data.to_dict()
    assert told["base_model"] == BASE and told["library_name"] == "peft"
    assert {"recommendation", "gdrt"} <= set(told["tags"])
    figures = {result.metric_type: result.metric_value for result in data.eval_results}
    assert figures == {"ndcg@10": 0.25, "nll": 3.5}
    assert json.loads((published / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_the_card_says_base_data_objective_groups_and_limits(published):
    text = ModelCard.load(published / "README.md").text
    assert "Fingerprint of this base: `ba5e`" in text and "Fingerprint of the data: `da7a`" in text
    assert "`gdrt`, tau 0.3" in text
    # The losses of the groups are those of the step whose weights the adapter holds.
    assert "| r in [-inf, -3) | 70 | 2.2500 |" in text and "| r in [-3, inf) | 90 |  |" in text
    assert "| 0 | 40 | 0.2500 | 4.5000 |" in text
    assert "| ndcg@10 | 0.2500 | 0.2000 .. 0.3000 | 40 |" in text
    assert "## Limits" in text and "Audit, Popularity: Lists are twice as popular." in text


def test_the_folder_names_no_path_of_this_machine(run, published):
    for name in ("README.md", "adapter_config.json", "prompt.json"):
        text = (published / name).read_text()
        assert str(run.parent) not in text and not re.search(r"(?<![\w/:.])/(root|home|tmp|work)/", text), (
            name
        )


def test_a_run_that_was_not_evaluated_says_so(run, tmp_path):
    for name in ("adapter", "config.yaml", "prompt.json", "catalogue.jsonl"):
        (tmp_path / name).symlink_to(run / name)
    write_adapter(tmp_path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This adapter was not evaluated as a whole" in card and "The run records no groups" in card


def test_adapters_that_change_nothing_or_are_not_finite_are_refused(run, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.yaml").symlink_to(run / "config.yaml")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in weights.items()}, file)
    with pytest.raises(UserError, match="lora_B matrices are zero"):
        write_adapter(tmp_path, tmp_path / "out")
    save_file({n: t * float("nan") for n, t in weights.items()}, file)
    with pytest.raises(UserError, match="is not finite"):
        write_adapter(tmp_path, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match="no adapter"):
        write_adapter(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("upload", [[], ["--push", "owner/films", "--base-name", BASE]])
def test_an_adapter_on_a_base_with_new_tokens_is_refused(run, tmp_path, hub, capsys, upload):
    """Its rows for the new tokens do not fit the base of the hub."""
    hub("", offline=True)  # the refusal comes before what an upload lacks
    mine = copy_of(run, tmp_path / "run")
    change_config(mine, {"model": {"new_tokens": "<[a-c]_[0-9]+>"}})
    with pytest.raises(SystemExit):
        main([*command(mine, tmp_path / "out"), *upload])
    said = capsys.readouterr().err
    assert "model.new_tokens = <[a-c]_[0-9]+>" in said and "leave --adapter-only out" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=["merged", "adapter alone"])
def export_to(request, run, capsys):
    """Runs the export of either kind, which must be refused; returns what it says."""

    def refused(output, *more) -> str:
        words = [*command(run, output), *more]
        if request.param == "merged":
            words.remove("--adapter-only")
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and "fix: " in said
        return said

    return refused


def test_outputs_that_cannot_be_used_are_refused_in_words(export_to, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert f"--output {tmp_path / 'file'} is a file" in export_to(tmp_path / "file")
    assert f"--output {tmp_path} is not empty" in export_to(tmp_path)
    assert "cannot be used (File name too long)" in export_to(tmp_path / ("x" * 300))
    assert "cannot be written" in export_to(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "--output . is the folder that you are in" in export_to(".")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_an_empty_folder_is_an_output(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert main(command(run, tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "README.md").is_file()


@pytest.mark.parametrize("size", ["4 gigs", "0MB", "GB", "4"])
def test_a_shard_size_that_is_none_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch, size):
    monkeypatch.setattr(exporting, "_write_model", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match=f"--shard-size {size} is no size of a file"):
        exporting.export(run, tmp_path / "out", shard_size=size)
    assert [shard_bytes(text) for text in ("4GB", " 1.5 mb", "2KB")] == [4 * 10**9, 1_500_000, 2000]


def test_damaged_files_of_an_adapter_are_refused_in_words(run, tmp_path):
    mine = copy_of(run, tmp_path / "run")
    weights, settings = (
        mine / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        write_adapter(mine, tmp_path / "out")
    weights.write_bytes(whole)
    for text in ("{", "[]"):
        settings.write_text(text)
        with pytest.raises(UserError, match="adapter_config.json cannot be read"):
            write_adapter(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_line_of_a_killed_run_does_not_stop_the_card(run, tmp_path):
    mine = copy_of(run, tmp_path / "run")
    with open(mine / "validation.jsonl", "a") as stream:
        stream.write('{"step": 20, "group_lo')
    write_adapter(mine, tmp_path / "out")
    assert "| r in [-inf, -3) | 70 | 2.2500 |" in (tmp_path / "out" / "README.md").read_text()


def test_paths_of_the_settings_are_cut_wherever_the_export_is_called(run, tmp_path, monkeypatch):
    """None of them exists here; an export is often made on another machine or from another folder."""
    mine = copy_of(run, tmp_path / "work" / "runs" / "one")
    base = tmp_path / "work" / "secret" / "base-model"
    base.parent.mkdir()
    shutil.move(mine / "base", base)
    (tmp_path / "work" / "secret" / "items").mkdir()
    data = {"path": "secret/clients/acme/log.csv", "items": "secret/items", "users": "secret/users.csv"}
    data["train_file"] = "../secret/train.csv"
    model = {"path": "secret/base-model", "tokenizer": str(base)}
    change_config(mine, {"data": data, "model": model, "run": {"dir": "runs/one"}})
    change_config(mine, {"prompt": {"domain": "x" * 300}, "dro": {"frozen_weights": "/secret/runs/two"}})
    settings = json.loads((mine / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (mine / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    done = write_adapter(mine, tmp_path / "out")
    assert done["base"] == "base-model"
    for file in (tmp_path / "out").iterdir():
        assert b"secret" not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes(), file
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("`log.csv`", "items: items", "users: users.csv", "path: base-model", "dir: one", "x" * 300):
        assert line in card


def test_names_of_the_hub_stay_in_the_settings(run, tmp_path):
    config = load_config(run / "config.yaml")
    config.data.path, config.model.path = "owner/log:small", BASE
    config.data.items, config.deepspeed = "owner/items", "ds_configs/zero3_qlora.json"
    config.run.dir = "clients/acme"  # no name of the hub, wherever the run lies now
    config.data.mixture = {"owner/rows": 1.0, "/a/rows.jsonl": 2.0, "/b/rows.jsonl": 3.0}
    found = public_settings(config, tmp_path)
    assert found["data"]["path"] == "owner/log:small" and found["data"]["items"] == "owner/items"
    assert found["model"]["path"] == BASE and found["deepspeed"] == "zero3_qlora.json"
    assert found["data"]["mixture"] == {"owner/rows": 1.0, "rows.jsonl": 2.0, "rows.jsonl (2)": 3.0}
    assert found["run"]["dir"] == "acme"
    assert found["prompt"]["template"] == "alpaca" and found["data"]["format"] == "auto"


def test_the_adapter_of_a_run_on_rows_has_its_prompt_and_a_card_about_rows(tmp_path, capsys):
    rows = "".join(json.dumps({"prompt": f"p {n}", "completion": f" c {n % 3}"}) + "\n" for n in range(60))
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = [f"data.path={tmp_path / 'rows.jsonl'}", "data.format=sft", "objective=sft"]
    mine = make_run(tmp_path / "run", settings)
    evaluate(["--run", str(mine), "--floors", "none", "--bootstrap", "20"])
    done = write_adapter(mine, tmp_path / "out")
    assert done["catalogue"] == "no catalogue: the run has no catalogue.jsonl"
    assert (tmp_path / "out" / "prompt.json").read_bytes() == (mine / "prompt.json").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    about, _, settings = card.partition("## Settings")
    assert not re.search("catalogue|title|recommend|history|split by", about), about
    assert "answers with a completion" in about and "`rows.jsonl`: rows of prompt and completion" in about
    assert "rows, scored over the vocabulary" in about and "| nll |" in about

    exporting.export(mine, tmp_path / "merged")
    about, _, settings = (
        (tmp_path / "merged" / "README.md").read_text().partition("## Training configuration")
    )
    assert not re.search("recommender|split by|items", about) and "| nll |" in about
    assert (tmp_path / "merged" / "prompt.json").is_file()


def copy_of(run, folder):
    """A run folder that a test may change."""
    return shutil.copytree(run, folder)


def change_config(run, changes) -> None:
    """Sets keys of sections in config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for section, values in changes.items():
        config[section].update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "repository, base, words",
    [
        ("no owner", BASE, "no name of the hub"),
        ("films", BASE, "no name of the hub"),
        ("a/b/c", BASE, "no name of the hub"),
        ("owner/films", "tiny-random", "others could not load it"),
        ("owner/films", "/models/llama", "others could not load it"),
    ],
)
def test_names_that_the_hub_does_not_take_are_refused(repository, base, words):
    with pytest.raises(UserError, match=words) as error:
        check_upload(repository, base)
    assert "owner/name" in error.value.fix


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets what huggingface_hub read from the environment when it was imported."""

    def set_variables(token: str, offline: bool):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    return set_variables


@pytest.mark.parametrize(
    "token, offline, words",
    [("", False, "there is no token of the hub"), ("hf_x", True, "forbids the network")],
)
def test_a_missing_token_and_a_forbidden_network_are_said_before_anything_is_written(
    run, tmp_path, hub, capsys, token, offline, words
):
    hub(token, offline)
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main([*command(run, output), "--push", "owner/films", "--base-name", BASE])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and "fix: " in said
    assert not output.exists()


def test_a_hub_that_is_not_reached_is_said_and_the_folder_stays(run, tmp_path, hub, capsys):
    hub("hf_x", offline=False)
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main([*command(run, output), "--push", "owner/films", "--base-name", BASE])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "http://127.0.0.1:9 is not reached" in said
    assert f"hf upload owner/films {output}" in said
    assert (output / "README.md").is_file()


def command(run, output) -> list[str]:
    return ["--run", str(run), "--output", str(output), "--adapter-only"]


def test_the_command_writes_the_folder_and_refuses_to_push_merged_models(run, tmp_path, capsys):
    assert main(command(run, tmp_path / "out")) == 0
    assert "adapter for tiny-random; catalogue of 24 titles" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command(run, tmp_path / "merged")[:-1], "--push", "owner/films"])
    assert "--push uploads adapters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, words",
    [
        (["--adapter-only", "--dtype", "bfloat16"], "--dtype would change nothing"),
        (["--adapter-only", "--base", "trained"], "--base would change nothing"),
        (["--adapter-only", "--check", "loaded"], "--check would change nothing"),
        (["--adapter-only", "--in-memory", "--shard-size", "1GB"], "--shard-size, --in-memory would change"),
        (["--base-name", BASE], "and a merged model is written"),
        (["--public"], "--public is about a repository that --push makes"),
        (["--adapter-only", "--public"], "--public is about a repository that --push makes"),
    ],
)
def test_options_that_would_change_nothing_are_refused(run, tmp_path, capsys, given, words):
    with pytest.raises(SystemExit) as ended:
        main(["--run", str(run), "--output", str(tmp_path / "out"), *given])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and "fix: " in said
    assert not (tmp_path / "out").exists()
