"""Trained rows of added tokens: PEFT's values and gradients for tied and untied heads; scores; export."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.scoring import per_item_scores
from gdrt_ds.batches import MicroBatch
from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.errors import UserError
from gdrt_ds.inference.catalogue_scoring import CatalogueScorer
from gdrt_ds.inference.exporting import export
from gdrt_ds.inference.path_reader import make_reader
from gdrt_ds.planning.memory_plan import estimate
from gdrt_ds.training.model_with_loss import FusedLossModel
from tests.eval.scoring_models import trie_of
from tests.models.family_models import TITLES, make_family, spread_weights
from tests.models.test_model import load

NEW = ["<a_1>", "<a_2>", "<b_1>"]
LORA = {"dropout": 0.0, "r": 4, "trainable_tokens": "added"}


def make_folder(folder, tied: bool, family="llama"):
    """A model with three added tokens: rows of the embedding and names in the tokenizer."""
    plain = make_family(family, folder)
    path = folder / f"{family}_{tied}"
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_tokens(NEW)
    config = transformers.AutoConfig.from_pretrained(plain)
    config.vocab_size = len(tokenizer)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    spread_weights(model)
    if tied:
        model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def path(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("rows"), request.param)


@pytest.fixture
def ids(path):
    added = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(NEW)
    return torch.tensor([[5, added[0], 9, added[2], 11, added[1], 4]])


def fused_loss(model, ids):
    """The mean loss of the next tokens, as training computes it."""
    length = ids.shape[1] - 1
    micro = MicroBatch(
        {"input_ids": ids[:, :-1], "attention_mask": torch.ones(1, length, dtype=torch.long)},
        torch.arange(length),
        ids[0, 1:],
        None,
        None,
        length,
        torch.zeros(1, length, dtype=torch.long),
    )
    return model(micro, torch.zeros(length, dtype=torch.long), 1)[1].mean()


def rows_of(model):
    return {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}


def peft_alone(path, loaded):
    """The same adapter in PEFT, without anything of this package."""
    base = AutoModelForCausalLM.from_pretrained(path)
    config = loaded.model.peft_config["default"]
    lora = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=config.target_modules,
        trainable_token_indices=config.trainable_token_indices,
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(base, lora)
    with torch.no_grad():
        mine = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
        theirs = {n: p for n, p in peft.named_parameters() if p.requires_grad}
        assert set(mine) == set(theirs)
        for name, parameter in theirs.items():
            mine[name].add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            parameter.copy_(mine[name])
    return peft


def test_loss_and_gradients_are_those_of_peft_alone(path, ids):
    loaded = load(path, quantization="none", lora=LORA)
    peft = peft_alone(path, loaded)
    expected = peft(input_ids=ids, labels=ids).loss
    expected.backward()
    model = FusedLossModel(loaded.model)
    loss = fused_loss(model, ids)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = dict(peft.named_parameters())
    assert len(rows_of(loaded.model)) == (1 if loaded.model.config.tie_word_embeddings else 2)
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name
            assert parameter.grad.abs().sum() > 0, name


def test_only_the_rows_of_the_chosen_tokens_are_trained_and_the_base_stays(path, ids):
    loaded = load(path, lora=LORA)
    assert any("rows of 3 tokens in embed_tokens" in line for line in loaded.lines)
    base = loaded.model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight
    before = base.clone()
    model = FusedLossModel(loaded.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = fused_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(base, before)
    with loaded.model.disable_adapter(), torch.no_grad():
        plain = load(path, train=False)
        assert fused_loss(model, ids).item() == pytest.approx(
            plain.model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
        )


def test_the_memory_plan_counts_every_trained_row_once_per_matrix(path, tmp_path):
    config = transformers.AutoConfig.from_pretrained(path)
    plans = []
    for rows in (None, "added"):
        settings = RunConfig(model={"dtype": "float32", "lora": LORA | {"trainable_tokens": rows}})
        plans.append(estimate(settings, config, 1, None, token_rows=len(NEW) if rows else 0).parts)
    rows = rows_of(load(path, quantization="none", lora=LORA).model)
    trained = sum(p.numel() for p in rows.values())
    without, counted = plans
    # On one rank of ZeRO-3 in float32: the rows, their gradients twice, a master and two moments.
    assert counted["adapter and gradients"] - without["adapter and gradients"] == trained * 4 * 3
    assert counted["optimizer"] - without["optimizer"] == trained * 12
    assert counted["loss"] - without["loss"] == len(NEW) * config.vocab_size * 4


def test_a_saved_adapter_is_scored_exactly_and_exported(path, tmp_path):
    run = tmp_path / "run"
    loaded = load(path, lora=LORA)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    loaded.model.save_pretrained(run / "adapter", save_embedding_layers=False)
    (run / "config.yaml").write_text(
        dump_config(RunConfig(model={"path": str(path), "dtype": "float32", "lora": LORA}))
    )
    again = PeftModel.from_pretrained(load(path, train=False).model, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    items = [
        tokenizer(t, add_special_tokens=False).input_ids + [2] for t in ("<a_1><b_1>", "<a_2><b_1>", *TITLES)
    ]
    trie, prompt = trie_of(items), tokenizer("Alien (1979)").input_ids
    for scoring in ("renormalised", "full"):
        found = CatalogueScorer(make_reader(again, []), trie, scoring).score([prompt])[0]
        assert torch.allclose(found, per_item_scores(again, trie, prompt, scoring=scoring), atol=2e-4)
    export(run, tmp_path / "merged", base="trained")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        query = torch.tensor([items[0]])
        assert torch.allclose(merged(query).logits, loaded.model.eval()(query).logits, atol=1e-4)


def test_names_that_are_no_tokens_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="'<c_9>', which is not one token") as error:
        load(path, lora={"trainable_tokens": ["<a_1>", "<c_9>"]})
    assert "rows to the embedding" in error.value.fix
    plain = shutil.copytree(path, tmp_path / "plain")
    words = make_family("llama", tmp_path)
    for file in words.glob("tokenizer*"):
        shutil.copy(file, plain)
    with pytest.raises(UserError, match="no added tokens"):
        load(plain, lora={"trainable_tokens": "added"})
