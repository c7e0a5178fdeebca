"""Exported models load in transformers alone, give the logits of base + adapter, and say what they are."""

import json
import os
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gdrt_ds.config import RunConfig, dump_config, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.export import main
from gdrt_ds.files import sha256_of
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.model_card import own_evaluation
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.fingerprint import base_fingerprint
from tests.models.test_model import TEXTS, load

PROBE = torch.arange(3, 20)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


def make_run(folder, tie=False, zero=False, **model):
    """A run folder as far as the export reads it; returns it with the logits of base + adapter."""
    path = make_tiny_model(folder / "tiny", TEXTS, 0, tie_embeddings=tie)
    run = folder / "run"
    run.mkdir()
    loaded = load(path, **model)
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.05)
    loaded.model.save_pretrained(run / "adapter", save_embedding_layers=False)
    (run / "config.yaml").write_text(
        dump_config(RunConfig(model={"path": str(path), "dtype": "float32", **model}))
    )
    return run, logits(loaded.model)


def evaluate(run, name, value, written, split="test", config=None, **key):
    """An evaluation folder that `eval.run` could have written, as far as the card reads it."""
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    adapter = sha256_of(run / "adapter" / "adapter_model.safetensors")
    metric = {"value": value, "ci_low": value, "ci_high": value, "n": 40}
    results = {
        "metrics": {"ndcg@10": metric},
        "split": split,
        "config": config or {},
        "num_samples": 40,
        "num_items": 24,
        "scoring_key": {"adapter": adapter, "limit": None, "corpus": "c0ffee", **key},
    }
    (folder / "results.json").write_text(json.dumps(results))
    os.utime(folder / "results.json", (written, written))


def card_of(run, output, *arguments):
    export(run, output, *arguments)
    return (output / "README.md").read_text()


def test_the_base_as_trained_gives_the_logits_of_the_quantised_model(tmp_path):
    run, expected = make_run(tmp_path)
    done = export(run, tmp_path / "out", "float32", "trained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([300]) is not None
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert done["max_difference"] < 1e-4
    assert not any("lora" in name for name, _ in model.named_parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "dequantised from NF4" in card
    assert "objective: gdrt" in card
    assert "so its scores are the run's" in card


def test_a_tied_model_with_an_adapted_head_is_untied_when_merged(tmp_path):
    run, expected = make_run(tmp_path, tie=True, train_head=True, quantization="none")
    export(run, tmp_path / "out", "float32", shard_size="50KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_exports_refuse_unfinished_runs_and_folders_that_cannot_be_written(tmp_path):
    run, _ = make_run(tmp_path, quantization="none")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "busy")
    with pytest.raises(UserError, match="not a run folder"):
        export(tmp_path / "busy", tmp_path / "out")
    with pytest.raises(UserError, match="cannot be written"):
        export(run, tmp_path / "busy" / "file" / "out")
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no adapter"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_changes_nothing_is_refused(tmp_path):
    run, _ = make_run(tmp_path, zero=True, quantization="none")
    with pytest.raises(UserError, match="lora_B matrices are zero"):
        export(run, tmp_path / "out")


def test_the_card_takes_the_newest_full_evaluation_of_this_adapter(tmp_path):
    run, _ = make_run(tmp_path, quantization="none")
    assert "no full evaluation yet" in card_of(run, tmp_path / "none")
    evaluate(run, "a-older", 0.1111, written=1000)
    evaluate(run, "b-own", 0.2222, written=2000)
    evaluate(run, "a-base", 0.3333, written=3000, adapter="")
    evaluate(run, "c-part", 0.4444, written=4000, limit=8)
    evaluate(run, "d-other-adapter", 0.5555, written=5000, adapter="0" * 64)
    card = card_of(run, tmp_path / "out")
    assert "| ndcg@10 | 0.2222 | 0.2222 .. 0.2222 | 40 |" in card
    assert not re.search("0.1111|0.3333|0.4444|0.5555", card)


def test_the_card_has_no_figures_of_another_base_a_search_or_another_split(tmp_path):
    run, _ = make_run(tmp_path, quantization="nf4")
    base, section = tmp_path / "tiny", load_config(run / "config.yaml").model
    trained = base_fingerprint(base, section, torch.float32)
    plain = base_fingerprint(base, section.model_copy(update={"quantization": "none"}), torch.float32)
    evaluate(run, "a-plain", 0.1111, written=3000, model=plain, mode="renormalised")
    evaluate(run, "b-beam", 0.2222, written=4000, model=trained, mode="beam")
    evaluate(run, "c-search", 0.3333, written=5000, model=trained, mode="best_first")
    evaluate(run, "d-valid", 0.4444, written=6000, split="valid", model=trained, mode="renormalised")
    assert "no full evaluation yet" in card_of(run, tmp_path / "none", "float32", "trained")
    evaluate(run, "e-full", 0.5555, written=2000, model=trained, mode="full")
    assert "| ndcg@10 | 0.5555 |" in card_of(run, tmp_path / "full", "float32", "trained")
    evaluate(run, "f-older", 0.6666, written=1000, model=trained, mode="renormalised")
    assert "| ndcg@10 | 0.6666 |" in card_of(run, tmp_path / "exact", "float32", "trained")


def test_without_a_fingerprint_the_settings_tell_the_base(tmp_path):
    """As in evaluations of earlier versions, and where the base is not on this machine."""
    run, _ = make_run(tmp_path, quantization="nf4")
    config = load_config(run / "config.yaml")
    for there in (True, False):
        key = {} if there else {"model": "0" * 64}
        evaluate(run, f"own-{there}", 0.1, 1000, config={"model": {"quantization": "nf4"}}, **key)
        evaluate(run, f"plain-{there}", 0.2, 2000, config={"model": {"quantization": "none"}}, **key)
        assert own_evaluation(run, config)["metrics"]["ndcg@10"]["value"] == 0.1
        shutil.rmtree(run / "eval")
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"prompt": {"history": "shuffle"}}},
        {"config": {"data": {"limit_test": 5}}},
        {"config": {"data": {"history_length": 3}}},
        {"corpus": "1" * 64},
    ],
)
def test_the_card_has_no_figures_of_other_histories_or_other_data(tmp_path, other):
    run, _ = make_run(tmp_path, quantization="none")
    (run / "summary.json").write_text(json.dumps({"data_fingerprint": "0" * 64}))
    evaluate(run, "a-own", 0.1111, written=1000, corpus="0" * 64)
    evaluate(run, "b-other", 0.2222, written=2000, **{"corpus": "0" * 64, **other})
    assert "| ndcg@10 | 0.1111 |" in card_of(run, tmp_path / "out")


def test_the_card_names_the_fingerprints_that_the_run_recorded(tmp_path):
    run, _ = make_run(tmp_path, quantization="none")
    assert "Fingerprint of the data: not recorded by the version" in card_of(run, tmp_path / "earlier")
    evaluate(run, "own", 0.5, written=1000)
    assert "Fingerprint of the data: `c0ffee`" in card_of(run, tmp_path / "evaluated")
    summary = {"data_fingerprint": "facade", "base_fingerprint": "decade", "dtype": "bfloat16"}
    (run / "summary.json").write_text(json.dumps(summary))
    card = card_of(run, tmp_path / "recorded")
    assert "Fingerprint of the data: `facade`" in card
    assert "Fingerprint of this base: `decade`" in card
    assert "dtype=torch.bfloat16" in card


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_code_on_the_card_loads_the_model_that_was_trained(tmp_path, quantization):
    run, expected = make_run(tmp_path, quantization=quantization)
    card = card_of(run, tmp_path / "out")
    assert ("more than a nat" in card) == (quantization == "nf4")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), expected)


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    run, _ = make_run(tmp_path, quantization="none")
    assert main(["--run", str(run), "--output", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/out: merged model in bfloat16 (tensor by tensor); logits differ" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
