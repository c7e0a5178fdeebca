"""Loading, parts of every family, LoRA and attention choices, and the messages for what cannot be loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers

from gdrt_ds.config import ModelSection, TinySection, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.built_in import (
    COMPLETE_MARKER,
    SMOLLM2_NAME,
    SMOLLM2_PACKAGE,
    SMOLLM2_VERSION,
    SPECIAL_TOKENS,
    _write_model,
    find_smollm2,
    make_tiny_model,
    smollm2_folder,
)
from gdrt_ds.models.families import decoder, lm_head, lm_head_scaling
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.four_bit import FourBitLinear
from gdrt_ds.models.load import load_model
from gdrt_ds.models.source import load_tokenizer, read_model_config, resolve_model
from tests.distributed.scenario_sharded import FAMILIES, make_family

RUNTIME = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1)
TEXTS = ["Alien (1979)", "The Thing (1982)", "Brazil (1985)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(folder):
    return make_tiny_model(folder / "tiny", TEXTS, 0)


def load(path, train=True, seed=0, **changes):
    return load_model(
        ModelSection(**{"path": str(path), "dtype": "float32", **changes}), RUNTIME, train=train, seed=seed
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_head_and_scaling_rebuild_the_logits_of_every_family(folder, family):
    path = make_family(family, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        hidden = decoder(model)(input_ids=ids).last_hidden_state
        scale, cap = lm_head_scaling(model.config)
        logits = scale * lm_head(model)(hidden)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        assert torch.equal(logits, model(input_ids=ids).logits)
    assert (cap == 30.0) == (family == "gemma2")


def test_parts_are_found_through_peft_and_head_is_the_lora_layer_when_it_is_trained(tiny):
    loaded = load(tiny, train_head=True)
    assert type(decoder(loaded.model)).__name__ == "LlamaModel"
    assert hasattr(lm_head(loaded.model), "lora_A")
    assert not hasattr(lm_head(load(tiny).model), "lora_A")


def test_cohere_and_granite_scales_multiply_and_divide():
    assert lm_head_scaling(transformers.CohereConfig(logit_scale=0.0625)) == (0.0625, None)
    assert lm_head_scaling(transformers.GraniteConfig(logits_scaling=8.0)) == (0.125, None)


def test_lora_is_seeded_trainable_alone_and_in_the_compute_dtype(tiny):
    a, b, c = load(tiny, seed=1), load(tiny, seed=1), load(tiny, seed=2)
    weights = [{n: p for n, p in x.model.named_parameters() if p.requires_grad} for x in (a, b, c)]
    assert weights[0] and all("lora_" in n for n in weights[0])
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])
    half = load(tiny, dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_loading_leaves_the_global_random_generator_alone(tiny):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    load(tiny)
    assert torch.equal(torch.rand(3), expected)


def test_nf4_weights_are_packed_bytes_and_stay_unpacked_on_avx512(tiny):
    loaded = load(tiny, train=False)
    linear = loaded.model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, FourBitLinear)
    assert linear.weight.dtype == torch.uint8
    assert not linear.support_avx512bf16_for_cpu
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = linear.weight.data.clone()
        loaded.model(input_ids=ids)
        assert torch.equal(linear.weight.data, before)


def test_all_linear_adapts_everything_but_the_head(tiny):
    loaded = load(tiny, lora={"targets": "all-linear"})
    adapted = {
        n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in loaded.model.named_parameters() if "lora_A" in n
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    ids, gradients = torch.arange(3, 20)[None], []
    for recompute in (False, True):
        model = load(tiny, gradient_checkpointing=recompute, lora={"dropout": 0.0}).model
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert (
        all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*gradients))
        and gradients[0][0].abs().sum() > 0
    )


def test_the_tiny_tokenizer_spells_any_text_and_keeps_titles_apart(tiny):
    tokenizer = load_tokenizer(tiny)
    for text in [*TEXTS, "Amélie (2001) 天空", "alien (1979)"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer(TEXTS[0], add_special_tokens=False).input_ids) < len(TEXTS[0])


def test_the_fingerprint_follows_weights_and_storage(tiny, folder):
    section, dtype = ModelSection(path=str(tiny)), torch.float32
    original = base_fingerprint(tiny, section, dtype)
    assert base_fingerprint(tiny, section, dtype) == original
    assert base_fingerprint(tiny, section.model_copy(update={"double_quant": False}), dtype) != original
    other = shutil.copytree(tiny, folder / "other")
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert base_fingerprint(other, section, dtype) != original


@pytest.mark.parametrize(
    "requested, dtype, message",
    [
        ("flash_attention_2", torch.float32, "runs on a GPU"),
        ("flash_attention_3", torch.bfloat16, "runs on a GPU"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused_by_name(requested, dtype, message):
    with pytest.raises(UserError, match=message):
        choose_attention(requested, torch.device("cpu"), dtype)


def test_the_automatic_attention_says_why():
    assert choose_attention("auto", torch.device("cpu"), torch.float32) == (
        "sdpa",
        "attention: sdpa (auto: flash-attn needs a GPU, this is cpu)",
    )
    name, line = choose_attention("auto", torch.device("cpu"), torch.float32, transformers.Gemma2ForCausalLM)
    assert name == "eager" and "Gemma2ForCausalLM does not run on SDPA" in line


def _broken(folder, tiny, name, damage):
    path = shutil.copytree(tiny, folder / name)
    damage(path)
    return path


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("truncated", _truncate, "cannot be loaded"),
        ("unweighted", lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors and no"),
        ("unconfigured", lambda p: (p / "config.json").unlink(), "no config.json"),
        ("garbled", lambda p: (p / "config.json").write_text("{"), "not readable"),
        (
            "eightbit",
            lambda p: (p / "config.json").write_text(
                json.dumps(
                    {
                        **json.loads((p / "config.json").read_text()),
                        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
                    }
                )
            ),
            "#1451",
        ),
        ("untokenized", lambda p: [f.unlink() for f in p.glob("tokenizer*")], "no readable tokenizer"),
    ],
)
def test_a_damaged_model_folder_is_one_clear_error(folder, tiny, name, damage, message):
    path = _broken(folder, tiny, name, damage)
    with pytest.raises(UserError, match=message) as error:
        load(resolve_model(str(path)))
    assert name in str(error.value) and error.value.fix


@pytest.mark.parametrize("path, message", [("./nowhere", "no such folder"), ("nowhere", "no such folder")])
def test_a_missing_model_names_what_is_allowed(path, message):
    with pytest.raises(UserError, match=message) as error:
        resolve_model(path)
    assert "smollm2-135m" in error.value.fix


def test_unknown_lora_targets_list_the_modules_of_the_model(tiny):
    with pytest.raises(UserError, match="names c_attn") as error:
        load(tiny, lora={"targets": ["q_proj", "c_attn"]})
    assert "gate_proj" in error.value.fix


def test_the_sizes_of_the_tiny_model_are_settings(tmp_path):
    sizes = TinySection(layers=3, hidden=48, heads=4, kv_heads=1, intermediate=96)
    config = read_model_config(
        resolve_model("tiny-random", tiny_folder=tmp_path / "base", texts=TEXTS, tiny=sizes)
    )
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (3, 48, 96)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)


@pytest.mark.parametrize("sizes", ["{hidden: 60, heads: 4}", "{heads: 4, kv_heads: 3}"])
def test_sizes_that_attention_cannot_divide_are_refused(sizes):
    with pytest.raises(UserError, match=r"model\.tiny"):
        load_config(None, [f"model.tiny={sizes}"])


def test_smollm2_has_its_own_special_tokens_whatever_transformers_reads_from_the_file():
    """transformers 5.17 reads the start of a turn as its end: titles then ended by another token."""
    tokenizer = load_tokenizer(smollm2_folder())
    named = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS}
    assert named == SPECIAL_TOKENS
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_same_weights_give_the_same_file_every_time(tmp_path):
    """A base made again is the base of its adapters: their fingerprint covers the file's header."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                tie_word_embeddings=True,
            )
        )
    for number in range(12):
        _write_model(model, tmp_path / str(number))
    assert len({(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(12)}) == 1
    assert len({base_fingerprint(tmp_path / str(n)) for n in range(12)}) == 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_folder_of_smollm2_that_was_made_with_other_tokens_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GDRT_CACHE", str(tmp_path))
    target = tmp_path / f"{SMOLLM2_NAME}-{SMOLLM2_VERSION}"
    target.mkdir()
    origin = {"package": SMOLLM2_PACKAGE, "version": SMOLLM2_VERSION, "file": find_smollm2().name}
    (target / COMPLETE_MARKER).write_text(json.dumps({**origin, **SPECIAL_TOKENS}))
    assert smollm2_folder() == target
    (target / COMPLETE_MARKER).write_text(json.dumps(origin))

    def refuse(*_, **__):
        raise OSError("converting again")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="converting again"):
        smollm2_folder()
