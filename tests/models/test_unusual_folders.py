"""Models that differ from most: towers for images, spare tokens, heads with a bias, sizes per layer."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from tokenizers import AddedToken

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.families import fused_experts, towers
from gdrt_ds.models.inventory import take_inventory
from gdrt_ds.models.load import check_vocabulary, load_model
from gdrt_ds.models.new_tokens import with_new_tokens
from gdrt_ds.models.source import load_tokenizer
from tests.models.family_models import SIZES, family_config

RUNTIME = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
TEXTS = ["Alien (1979)", "The Thing (1982)", "Brazil (1985)"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(make_tiny_model(tmp_path / "tiny", TEXTS))


def save(config, tokenizer, folder):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, **changes):
    return load_model(
        ModelSection(**{"path": str(folder), "dtype": "float32", "quantization": "none", **changes}),
        RUNTIME,
        train=True,
    )


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_the_adapter_of_a_model_that_sees_images_is_on_its_text_layers(tmp_path, tokenizer, targets):
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer)}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**SMALL, "image_size": 28, "patch_size": 14}, pad_token_id=0
    )
    loaded = load(save(config, tokenizer, tmp_path / "model"), lora={"r": 4, "targets": targets})
    adapted = [name for name, weight in loaded.model.named_parameters() if weight.requires_grad]
    assert adapted and all(".language_model.layers." in name for name in adapted)
    assert "not on model.vision_tower (text never passes it)" in " ".join(loaded.lines)
    assert fused_experts(loaded.model) == {}, "the head of the image tower has a tensor of three dimensions"
    plan = take_inventory(ModelSection(lora={"r": 4, "targets": targets}), config)
    assert plan.lora == sum(w.numel() for w in loaded.model.parameters() if w.requires_grad)
    loaded.model(input_ids=torch.arange(3, 15)[None]).logits.sum().backward()
    untouched = [n for n, w in loaded.model.named_parameters() if "lora_B" in n and not w.grad.any()]
    assert not untouched
    loaded.model.save_pretrained(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    assert [name for name, weight in again.named_parameters() if weight.requires_grad] == adapted


def test_models_of_text_alone_have_no_towers():
    model = transformers.AutoModelForCausalLM.from_config(family_config("qwen3", 320))
    assert towers(model) == []


def test_a_special_token_without_a_row_is_told_and_one_that_text_becomes_is_refused(tmp_path, tokenizer):
    rows = len(tokenizer)
    config = transformers.LlamaConfig(**SIZES, vocab_size=rows)
    assert check_vocabulary(tokenizer, config) == ""
    tokenizer.add_tokens([AddedToken("<image_soft_token>", special=True)])
    assert len(tokenizer) == rows + 1
    loaded = load(save(config, tokenizer, tmp_path / "model"))
    assert any(
        "special tokens without a row" in line and "<image_soft_token>" in line for line in loaded.lines
    )
    found = tokenizer("<image_soft_token>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert max(found) < rows, "the words of data are read like this"
    tokenizer.pad_token = "<image_soft_token>"
    with pytest.raises(UserError, match="'<image_soft_token>' has none"):
        check_vocabulary(tokenizer, config)


def test_an_ordinary_token_without_a_row_is_refused(tokenizer):
    config = transformers.LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<a_1>"])
    with pytest.raises(UserError, match="'<a_1>' has none") as error:
        check_vocabulary(tokenizer, config)
    assert "model.new_tokens" in error.value.fix


def test_a_head_with_a_bias_gets_new_tokens(tmp_path, tokenizer):
    old = len(tokenizer)
    config = transformers.PhiConfig(**SIZES, vocab_size=old)
    source = save(config, tokenizer, tmp_path / "phi")
    folder = with_new_tokens(source, tokenizer, ["<a_1>", "<a_2>"], tmp_path / "wider", 0)
    model = load(folder).model
    head = model.get_output_embeddings()
    assert head.weight.shape[0] == head.bias.shape[0] == old + 2
    before = transformers.AutoModelForCausalLM.from_pretrained(source).get_output_embeddings().bias
    assert torch.equal(head.bias[:old], before) and torch.allclose(head.bias[old:], before.mean())


@pytest.mark.parametrize(
    "config, widths",
    [
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=320), (0, 0)),
        (
            transformers.Gemma3nTextConfig(
                **SMALL,
                num_key_value_heads=1,
                head_dim=16,
                vocab_size=320,
                vocab_size_per_layer_input=320,
                num_kv_shared_layers=0,
            ),
            (32, 16),
        ),
        (
            transformers.Gemma4TextConfig(
                **SMALL, num_key_value_heads=1, head_dim=16, global_head_dim=32, vocab_size=320
            ),
            (64, 32),
        ),
    ],
    ids=["no attention", "a size per layer", "sizes that differ between layers"],
)
def test_every_model_that_can_be_built_is_counted(config, widths):
    found = take_inventory(ModelSection(), config)
    assert (found.query, found.key_value) == widths and found.intermediate > 0
