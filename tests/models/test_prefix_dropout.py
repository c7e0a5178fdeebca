"""Dropout masks are a function of seed, step and prefix: against plain integers, and as random numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from gdrt_ds.batches.token_keys import step_entropy, token_keys
from gdrt_ds.config import RunConfig
from gdrt_ds.models.built_in import make_tiny_model
from gdrt_ds.models.load import load_model
from gdrt_ds.models.prefix_dropout import MOST_FORWARDS, other_dropout, use_prefix_dropout
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.loading import dropout_line
from gdrt_ds.training.model_with_loss import FusedLossModel

P = 0.3
TINY = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
WORD = 1 << 64
HALF_WORD = 1 << 32


def dropouts(count: int = 1, p: float = P):
    """`count` layers in training, and where their forwards begin."""
    model = nn.Sequential(*[nn.Dropout(p) for _ in range(count)]).train()
    return model, use_prefix_dropout(model)


def kept(layer: nn.Module, forwards, keys: np.ndarray, width: int, call: int = 0) -> np.ndarray:
    """bool[T, width]: what a forward of tokens with these keys keeps."""
    layer.calls = call  # the module that holds a layer counts anew in every forward
    forwards.begin(torch.from_numpy(keys)[None])
    return (layer(torch.ones(1, len(keys), width))[0] != 0).numpy()


# -- the same in plain integers ------------------------------------------------------------------------
def plain_keys(tokens: list[int], entropy: int) -> list[int]:
    found, power, total = [], 1, 0
    for token in tokens:
        power = power * 0x9E3779B97F4A7C15 % WORD
        total = (total + (token + 1) * power) % WORD
        value = total ^ entropy
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WORD
        value = (value ^ value >> 27) * 0x94D049BB133111EB % WORD
        found.append(value ^ value >> 31)
    return found


def plain_lowbias32(value: int) -> int:
    value = (value ^ value >> 16) * 0x7FEB352D % HALF_WORD
    value = (value ^ value >> 15) * 0x846CA68B % HALF_WORD
    return value ^ value >> 16


def plain_kept(key: int, name: str, call: int, column: int, p: float) -> bool:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    number = (number + call * 0x9E3779B97F4A7C15) % WORD
    mixed = (key ^ number) * 0x2545F4914F6CDD1D % WORD
    word = plain_lowbias32(mixed >> 32 ^ plain_lowbias32(column // 2 + 1))
    half = word >> 16 if column % 2 else word & 0xFFFF
    if half >= 1 << 15:
        half -= 1 << 16
    return half >= round(p * 65536) - (1 << 15)


def test_masks_are_those_of_plain_integers():
    tokens, entropy, width = np.random.default_rng(0).integers(0, 50_000, 9), step_entropy(3, 5), 7
    model, forwards = dropouts(3)
    keys = token_keys(tokens, entropy)
    expected_keys = plain_keys(tokens.tolist(), entropy)
    assert [int(key) % WORD for key in keys] == expected_keys
    for name, layer in model.named_children():
        for call in range(2):
            expected = [
                [plain_kept(k, name, call, column, P) for column in range(width)] for k in expected_keys
            ]
            assert (kept(layer, forwards, keys, width, call) == np.array(expected)).all()


# -- what they hang on ---------------------------------------------------------------------------------
def test_equal_prefixes_have_one_mask_and_everything_else_has_its_own():
    (layer, other), forwards = dropouts(2)
    tokens, width = np.arange(3, 43), 200

    def masks(tokens, seed=3, step=5, layer=layer):
        return kept(layer, forwards, token_keys(np.asarray(tokens), step_entropy(seed, step)), width)

    first = masks(tokens)
    assert (masks(tokens) == first).all()
    torch.rand(17)
    assert (masks(np.append(tokens[:20], tokens[:20]))[:20] == first[:20]).all(), (
        "what comes later is no part"
    )
    different = [
        masks(tokens, seed=4),
        masks(tokens, step=6),
        masks(tokens, layer=other),
        masks(np.append([2], tokens[1:])),  # another first token: every later prefix is another one
        masks(tokens[::-1]),
    ]
    for number, mask in enumerate(different):
        assert not any((mask == base).all(1).any() for base in (first, *different[:number])), number


def test_a_repeated_token_has_another_mask_at_each_place():
    (layer,), forwards = dropouts()
    masks = kept(layer, forwards, token_keys(np.full(50, 7), step_entropy(0, 0)), 200)
    assert len(np.unique(masks, axis=0)) == 50


# -- as random numbers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_that_is_dropped_and_the_scale(p):
    (layer,), forwards = dropouts(p=p)
    forwards.begin(torch.from_numpy(token_keys(np.arange(500), 1))[None])
    output = layer(torch.ones(1, 500, 401))
    deviation = np.sqrt(p * (1 - p) / output.numel())
    assert float((output == 0).float().mean()) == pytest.approx(p, abs=5 * deviation)
    assert float(output.max()) == pytest.approx(1 / (1 - p), rel=1e-4), "rounded to 1/65,536"


def test_masks_of_tokens_columns_and_layers_are_not_correlated():
    model, forwards = dropouts(2)
    keys = token_keys(np.random.default_rng(1).integers(0, 50_000, 600), step_entropy(0, 0))
    first, second = ((kept(layer, forwards, keys, 512) - (1 - P)) / np.sqrt(P * (1 - P)) for layer in model)
    pairs = {
        "layers": first * second,
        "tokens": first[1:] * first[:-1],
        "columns": first[:, 1:] * first[:, :-1],
        "halves of a word": first[:, 0::2] * first[:, 1::2],
        "columns far apart": first[:, 256:] * first[:, :256],
    }
    for what, products in pairs.items():
        assert abs(products.mean()) < 5 / np.sqrt(products.size), what
    assert abs((first.mean(1) * np.sqrt(512)).std() - 1) < 0.15, "tokens drop as many as chance would"


# -- in a model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_has_its_mask_again_though_another_forward_began(reentrant):
    model, forwards = dropouts()
    keys = torch.from_numpy(token_keys(np.arange(8), 1))[None]
    x = torch.ones(1, 8, 64, requires_grad=True)
    torch.manual_seed(11)
    forwards.begin(keys)
    output = checkpoint(model, x, use_reentrant=reentrant)
    forwards.begin_beside(torch.from_numpy(token_keys(np.arange(5), 1))[None])
    model(torch.ones(1, 5, 64))
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())


def test_rows_that_are_no_tokens_and_forwards_that_nobody_began_get_the_masks_of_torch():
    (layer,), forwards = dropouts()
    torch.manual_seed(5)
    assert 0 < float((layer(torch.ones(1, 40, 8)) == 0).float().mean()) < 1
    forwards.begin(torch.from_numpy(token_keys(np.arange(40), 1))[None])
    with pytest.warns(
        UserWarning, match=r"dropout 0: the rows of its input \[13, 8\] are not the tokens \[1, 40\]"
    ):
        assert 0 < float((layer(torch.ones(13, 8)) == 0).float().mean()) < 1
    flat = []
    for shape in ((40, 8), (1, 40, 8)):
        layer.calls = 0
        flat.append(layer(torch.ones(shape)).view(40, 8))
    assert torch.equal(*flat), "the same tokens in one dimension"
    keys = torch.from_numpy(token_keys(np.arange(40), 1)).view(4, 10)
    forwards.begin(keys)
    model, forwards = dropouts()
    forwards.begin(keys)
    with pytest.warns(UserWarning, match="are not the tokens"):
        model(torch.ones(10, 4, 8))  # the other way round: as many rows, in another order


def test_in_evaluation_nothing_is_dropped():
    model, forwards = dropouts()
    forwards.begin(torch.from_numpy(token_keys(np.arange(4), 1))[None])
    assert torch.equal(model.eval()(torch.ones(1, 4, 8)), torch.ones(1, 4, 8))


def test_a_layer_that_is_used_twice_has_two_masks_and_the_same_two_again(tmp_path):
    """Phi drops the output of attention and of the MLP with one layer."""
    settings = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.PhiConfig(vocab_size=64, resid_pdrop=0.3, embd_pdrop=0.0, **settings)
    model = transformers.PhiForCausalLM(config).train()
    forwards = use_prefix_dropout(model)
    masks = []
    model.model.layers[1].resid_dropout.register_forward_hook(
        lambda module, inputs, output: masks.append(output == 0)
    )
    ids = torch.arange(3, 13)[None]
    keys = torch.from_numpy(token_keys(ids[0].numpy(), 1))[None]
    for _ in range(2):
        forwards.begin(keys)
        model(input_ids=ids, use_cache=False)
    first, second, first_again, second_again = masks
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again) and torch.equal(second, second_again)


def test_masks_hang_on_a_layer_s_name_and_not_on_what_else_is_loaded():
    keys = token_keys(np.arange(30), 1)
    found = []
    for more in ({}, {"another": nn.Dropout(0.5)}):
        model = nn.ModuleDict(more | {"layer": nn.Dropout(P)}).train()
        forwards = use_prefix_dropout(model)
        found.append(kept(model["layer"], forwards, keys, 64))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("p", [0.999999, 1.0])
def test_where_everything_is_dropped_torch_does_it(p):
    (layer,), forwards = dropouts(p=p)
    forwards.begin(torch.zeros(1, 8, dtype=torch.long))
    assert float((layer(torch.ones(1, 8, 16)) == 0).float().mean()) == 1.0


def test_a_forward_that_is_long_over_cannot_be_computed_again():
    model, forwards = dropouts()
    x = torch.ones(1, 8, 16, requires_grad=True)
    torch.manual_seed(1)
    forwards.begin(torch.zeros(1, 8, dtype=torch.long))
    output = checkpoint(model, x, use_reentrant=False)
    for seed in range(2, 3 + MOST_FORWARDS):
        torch.manual_seed(seed)
        forwards.begin(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(RuntimeError, match="its dropout masks are gone"):
        output.sum().backward()


@pytest.mark.parametrize(
    "config, said",
    [
        (transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32), "attn_pdrop = 0.1"),
        (transformers.LlamaConfig(attention_dropout=0.2, **TINY), "attention_dropout = 0.2"),
        (transformers.LlamaConfig(**TINY), ""),
        (transformers.OPTConfig(dropout=0.3, ffn_dim=32, word_embed_proj_dim=16, **TINY), "dropout = 0.3"),
    ],
)
def test_dropout_that_is_no_layer_is_named(config, said):
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_prefix_dropout(model)
    line = other_dropout(model)
    assert said in line and bool(line) == bool(said)
    assert "resid_pdrop" not in line, "a layer of its own"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_model_keeps_the_masks_of_torch_and_says_so(tmp_path, compiled):
    path = make_tiny_model(tmp_path / "model", ["Heat (1995)"], 0, hidden=32)
    config = RunConfig.model_validate(
        {"model": {"path": str(path), "quantization": "none", "dtype": "float32", "compile": compiled}}
    )
    model = load_model(config.model, Runtime(), train=True, path=path, seed=0).model
    FusedLossModel(model, prefix_dropout=not compiled)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert layers and all((type(layer) is nn.Dropout) == compiled for layer in layers)
    assert ("model.compile is set" in dropout_line(config, model)) == compiled
