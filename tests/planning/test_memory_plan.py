"""The memory plan counts real models exactly where it can, follows the settings, and advises when it does not
fit.
"""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from gdrt_ds.config import RunConfig
from gdrt_ds.models.inventory import take_inventory
from gdrt_ds.planning.memory_plan import estimate

LLAMA8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
SMALL = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
)


def config(**model):
    return RunConfig(model=model, train={"micro_batch": 4})


def test_the_inventory_equals_the_counts_of_a_loaded_model(tmp_path):
    from gdrt_ds.models.built_in import make_tiny_model
    from tests.models.test_model import TEXTS, load

    path = make_tiny_model(tmp_path / "m", TEXTS, 0)
    loaded = load(path)
    quantised = sum(
        p.quant_state.shape.numel() for p in loaded.model.parameters() if hasattr(p, "quant_state")
    )
    lora = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    total = sum(
        p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel()
        for p in loaded.model.parameters()
    )
    found = take_inventory(config().model, transformers.AutoConfig.from_pretrained(path))
    assert (found.quantised, found.lora, found.plain) == (quantised, lora, total - quantised - lora)


def test_8b_counts_are_those_of_the_model_card():
    found = take_inventory(config().model, transformers.LlamaConfig(**LLAMA8B))
    assert found.quantised + found.plain == 8_030_261_248
    assert found.lora == 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_zero3_divides_the_base_by_the_ranks_and_quant_state_stays_whole():
    plans = {
        world: estimate(config(), transformers.LlamaConfig(**LLAMA8B), world, 80 << 30) for world in (1, 8)
    }
    assert plans[1].parts["base weights"] == pytest.approx(8 * plans[8].parts["base weights"], rel=1e-6)
    assert plans[1].parts["quant_state"] == plans[8].parts["quant_state"]


def test_checkpointing_lowers_activations_and_advice_says_so():
    model = transformers.LlamaConfig(**LLAMA8B)
    tight = estimate(config(), model, 8, 24 << 30)
    assert tight.peak_bytes > 24 << 30 and any(
        "gradient_checkpointing=true" in line for line in tight.lines()
    )
    assert any("will NOT fit" in line for line in tight.lines())
    eased = estimate(config(gradient_checkpointing=True), model, 8, 24 << 30)
    assert eased.parts["activations"] < tight.parts["activations"] / 10
    assert not eased.advice and any("it fits" in line for line in eased.lines())


def test_activations_follow_the_tokens_given():
    model = transformers.LlamaConfig(**SMALL)
    a, b = (estimate(config(), model, 2, None, tokens=n, targets=10) for n in (1000, 2000))
    assert b.parts["activations"] == 2 * a.parts["activations"]


def test_making_a_dropout_mask_is_counted():
    model = transformers.LlamaConfig(**SMALL)
    with_dropout, without = (
        estimate(config(lora={"dropout": p}), model, 1, None, tokens=100_000, targets=10) for p in (0.1, 0.0)
    )
    part = "dequantised and transient"
    assert with_dropout.parts[part] > without.parts[part]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_bytes_match_what_autograd_saves(tmp_path, dropout):
    """Counts the storages that autograd really keeps for one more token, two lengths of one forward pass of a
    real NF4 model.
    """
    from gdrt_ds.models.built_in import make_tiny_model
    from gdrt_ds.models.prefix_dropout import use_prefix_dropout
    from gdrt_ds.planning.memory_plan import activation_bytes_per_token
    from tests.models.test_model import TEXTS, load

    path = make_tiny_model(tmp_path / "m", TEXTS, 0, num_layers=4, hidden=128, intermediate=384)
    loaded = load(path, lora={"dropout": dropout})
    backbone = loaded.model.get_base_model().model
    forwards = use_prefix_dropout(loaded.model)
    parameters = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}

    def saved_bytes(length):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        forwards.begin(torch.arange(length)[None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = backbone(input_ids=torch.randint(3, 100, (1, length))).last_hidden_state
        total = sum(size for size, _ in storages.values())
        del out
        return total

    measured = (saved_bytes(512) - saved_bytes(256)) / 256 / 4
    section = config(lora={"dropout": dropout})
    predicted = activation_bytes_per_token(
        take_inventory(section.model, transformers.AutoConfig.from_pretrained(path)), 4, dropout
    )
    assert predicted == pytest.approx(measured, rel=0.15)


def test_the_measured_peak_sees_what_was_held_and_starts_anew():
    import numpy as np

    from gdrt_ds.training.memory_use import PeakMemory, format_bytes

    first = PeakMemory(torch.device("cpu"))
    if first.bytes_here() is None:
        pytest.skip("no /proc/self/status: the peak is measured on Linux only")
    block = np.ones(128 << 17)  # 128 MiB, touched
    del block
    second = PeakMemory(torch.device("cpu"))
    assert first.largest() >= 0 and second.largest() < 64 << 20, "an old peak must not count"
    block = np.ones(128 << 17)
    held = second.largest()
    assert 120 << 20 <= held <= 200 << 20 and block.size
    assert format_bytes(held).endswith("MiB") and format_bytes(None) == "unknown on this system"


def test_on_a_cpu_the_plan_names_an_allocator_that_it_does_not_hold_for(tmp_path, monkeypatch):
    from gdrt_ds.training import memory_use

    maps = tmp_path / "maps"
    monkeypatch.setattr(memory_use, "MAPS", maps)
    model = transformers.LlamaConfig(**SMALL)
    for text, name in [
        ("7f00 r-xp /usr/lib/libc.so.6\n", "glibc"),
        ("7f00 r-xp /usr/lib/libtcmalloc_minimal.so.4.5.10\n", "tcmalloc"),
    ]:
        maps.write_text(text)
        assert memory_use.cpu_allocator() == name
        assert any("LD_PRELOAD" in line for line in estimate(config(), model, 2, None).lines()) == (
            name == "glibc"
        )
    assert not any("LD_PRELOAD" in line for line in estimate(config(), model, 2, 80 << 30).lines())


def test_one_rank_gathers_nothing_since_its_slices_are_the_whole():
    model = transformers.LlamaConfig(**SMALL)
    gathered = {
        world: estimate(
            config(), model, world, None, deepspeed_config={"zero_optimization": {"stage": 3}}
        ).parts["gathered parameters"]
        for world in (1, 2)
    }
    assert gathered[1] == 0 and gathered[2] >= 300 * 64 * 4


def test_fused_experts_are_counted_in_full_because_nf4_does_not_reach_them():
    """Qwen3-30B-A3B: 128 experts of 3 x 2048 x 768 in each of 48 layers."""
    model = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_experts=128
    )
    experts = 48 * 128 * 3 * 2048 * 768
    found = take_inventory(config().model, model)
    assert found.experts == experts and found.plain > experts > 20 * found.quantised
    plan = estimate(config(dtype="bfloat16"), model, 8, 80 << 30)
    assert plan.parts["fused experts"] == experts * 2 // 8
    assert any("fused experts" in note and "bfloat16" in note for note in plan.lines())
    assert not estimate(config(), transformers.LlamaConfig(**SMALL), 1, None).parts["fused experts"]


def test_a_model_whose_stored_tensors_are_merged_is_whole_on_every_rank_while_it_loads():
    """Qwen3-30B-A3B on 8 GPUs of 40 GB: its slices fit, and loading does not."""
    mixture = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_experts=128
    )
    plan = estimate(config(dtype="bfloat16"), mixture, 8, 40 << 30)
    assert plan.loading_bytes > 2 * 48 * 128 * 3 * 2048 * 768 > plan.peak_bytes
    text = "\n".join(plan.lines())
    assert "while loading, per rank" in text and "merges its stored tensors" in text
    assert "loading will NOT fit" in text
    llama = transformers.LlamaConfig(**LLAMA8B)
    assert not estimate(config(dtype="bfloat16"), llama, 8, 40 << 30).loading_bytes
    whole = RunConfig(model={"dtype": "bfloat16", "loading": "stock"})
    assert "model.loading = stock" in "\n".join(estimate(whole, llama, 8, 40 << 30).lines())


def test_weights_that_ranks_cannot_read_in_slices_are_found_in_the_files(tmp_path):
    """Some trainers store a tied head beside the embedding: then every rank loads the whole model."""
    llama = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(llama)
    model.save_pretrained(tmp_path)
    settings = config(dtype="bfloat16")
    good = estimate(settings, llama, 8, 40 << 30, folder=tmp_path)
    assert not good.loading_reason and not good.loading_bytes
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = estimate(settings, llama, 8, 40 << 30, folder=tmp_path)
    assert "tied but both stored" in found.loading_reason and found.loading_bytes > good.parts["base weights"]
    assert not estimate(settings, llama, 1, 40 << 30, folder=tmp_path).loading_reason


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_plan_counts_what_loading_leaves_unquantised(tmp_path, family):
    from tests.models.family_models import make_family
    from tests.models.test_model import load

    path = make_family(family, tmp_path)
    loaded = load(path, lora={"targets": "all-linear"})
    kept = [p for p in loaded.model.parameters() if p.dim() >= 3]
    found = take_inventory(config().model, loaded.model.config)
    assert found.experts == sum(p.numel() for p in kept) > 0
    assert {p.dtype for p in kept} == {torch.float32}
    assert any("as fused experts" in line and "not quantised" in line for line in loaded.lines)


def test_a_second_copy_per_node_is_counted():
    model = transformers.LlamaConfig(**LLAMA8B)
    settings = RunConfig(model={"dtype": "bfloat16"}, deepspeed="ds_configs/zero3_hpz.json")
    plan = estimate(settings, model, 16, 80 << 30)
    assert plan.parts["secondary shards"] == pytest.approx(2 * plan.parts["base weights"], rel=1e-3)
    one = estimate(RunConfig(model={"dtype": "bfloat16"}), model, 16, 80 << 30)
    assert one.parts["secondary shards"] == 0


def test_gathered_parameters_follow_the_reuse_distance():
    """The 8B shape: about three packed layers and lm_head, instead of the whole base."""
    model = transformers.LlamaConfig(**LLAMA8B)
    found = {}
    for distance in ("auto", 0, 10**12):
        zero = {"stage": 3, "stage3_max_reuse_distance": distance, "stage3_prefetch_bucket_size": "auto"}
        raw = {"zero_optimization": zero}
        plan = estimate(config(dtype="bfloat16"), model, 2, 80 << 30, deepspeed_config=raw)
        found[distance] = plan.parts["gathered parameters"]
    head = 128256 * 4096 * 2
    layer = (take_inventory(config().model, model).quantised // 32) // 2
    assert found["auto"] == pytest.approx(head + 4 * layer, rel=0.01)
    assert found[0] == pytest.approx(head + 2 * layer, rel=0.01)
    assert found[10**12] == pytest.approx(2 * head + 32 * layer, rel=0.01)


def test_gloo_fills_a_second_buffer_while_it_gathers_the_largest_matrix():
    """Measured: an all-gather of 512 MiB on two gloo ranks raises the peak of each by another 512 MiB."""
    model = transformers.LlamaConfig(**LLAMA8B)
    raw = {"zero_optimization": {"stage": 3}}
    found = {
        (world, memory): estimate(config(dtype="bfloat16"), model, world, memory, deepspeed_config=raw).parts
        for world in (1, 2)
        for memory in (None, 80 << 30)
    }
    assert found[2, None]["copy while gathering"] == 128256 * 4096 * 2
    for without in ((1, None), (1, 80 << 30), (2, 80 << 30)):
        assert "copy while gathering" not in found[without]


def kept_for_backward(model_config, attention: str, **lora) -> int:
    """Bytes that autograd keeps of the layers of one forward, ROWS rows of LENGTH tokens."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation=attention)
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora)).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model.model.model(input_ids=torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300)
    return sum(size for size, _ in kept.values())


ROWS, LENGTH = 4, 256


@pytest.mark.parametrize(
    "kind, attention, lora",
    [("LlamaConfig", "sdpa", {}), ("Gemma2Config", "eager", {}), ("LlamaConfig", "sdpa", {"use_dora": True})],
    ids=["sdpa", "eager with a cap", "dora"],
)
def test_activations_are_those_that_autograd_keeps(kind, attention, lora):
    model_config = getattr(transformers, kind)(**SMALL)
    measured = kept_for_backward(model_config, attention, **lora)
    settings = RunConfig(
        model={
            "dtype": "float32",
            "quantization": "none",
            "lora": {"r": 4, "targets": "all-linear", "dropout": 0, "dora": bool(lora)},
        },
        train={"global_batch": ROWS, "micro_batch": ROWS, "packing": "none"},
        prompt={"max_length": LENGTH},
    )
    planned = estimate(settings, model_config, 1, None).parts["activations"]
    assert 0.7 < planned / measured < 1.5, (planned, measured)
