"""Ranks behind test_sharded_loading.py.

Every family loaded both ways at world 1, 2, 3 and compared to the bit; training both ways.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

from gdrt_ds.config import ModelSection
from gdrt_ds.models import sharded_loading
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.families import model_class
from gdrt_ds.models.load import load_model
from gdrt_ds.models.source import compute_dtype, read_model_config
from gdrt_ds.models.stock_loading import load_stock
from gdrt_ds.models.stored_four_bit import compute_in, stored_four_bit
from tests.distributed import engines
from tests.distributed.ranks import run_ranks
from tests.models import family_models

SIZES = dict(
    vocab_size=270,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
MULTIMODAL = ("gemma3_images", "gemma4")
"""Of tests/models/family_models.py; the first is stored under other names than its modules have."""
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 10}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 12}),
    "gemma2": ("Gemma2Config", {"head_dim": 12, "query_pre_attn_scalar": 12}),
    "phi": ("PhiConfig", {"num_attention_heads": 2}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def make_family(name: str, folder: Path) -> Path:
    config_name, changes = FAMILIES[name]
    sizes = {
        k: v
        for k, v in SIZES.items()
        if name != "gpt2"
        or k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = getattr(transformers, config_name)(**{**sizes, **changes})
    torch.manual_seed(3)
    path = folder / name
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too: zeros would hide a misplaced slice
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


def store_in_four_bit(source: Path, double: bool = True) -> Path:
    """A checkpoint of the model as transformers and bitsandbytes save it in 4 bits."""
    path = source.with_name(source.name + "_4bit" + ("" if double else "_single"))
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def compare(rank, world, path, **changes):
    """Differences between the two ways, in words; empty = bitwise equal."""
    import deepspeed

    section = ModelSection(**{"path": str(path), "dtype": "float32", **changes})
    device, dtype = torch.device("cpu"), compute_dtype(section.dtype, torch.device("cpu"))
    config = read_model_config(path)
    if stored_four_bit(config) is not None:
        config = compute_in(config, section, dtype)
    attention, _ = choose_attention("auto", device, dtype, model_class(config))
    setup = engines.deepspeed_config(3, world, section.dtype if section.dtype != "auto" else "float32")
    try:
        ours = sharded_loading.load_sharded(path, config, section, dtype, attention, device, setup)
    except sharded_loading.CannotShard as reason:
        return [f"cannot: {reason}"]
    stock = load_stock(path, config, section, dtype, attention, device)
    deepspeed.zero.Init(module=stock, config_dict_or_path=setup, dtype=dtype)
    differences = []
    mine, theirs = dict(ours.named_parameters()), dict(stock.named_parameters())
    if list(mine) != list(theirs):
        differences.append(f"names {set(mine) ^ set(theirs)}")
    for name in mine:
        a, b = mine[name], theirs[name]
        size = a.ds_tensor.numel()
        own = max(0, min(size, a.ds_numel - size * rank))
        same = (
            a.dtype == b.dtype
            and a.ds_shape == b.ds_shape
            and a.ds_tensor.shape == b.ds_tensor.shape
            and a.data.numel() == 0
            and torch.equal(a.ds_tensor[:own].view(torch.uint8), b.ds_tensor[:own].view(torch.uint8))
            and type(a) is type(b)
            and a.ds_status == b.ds_status
        )
        state_a, state_b = getattr(a, "quant_state", None), getattr(b, "quant_state", None)
        if state_b is not None:
            dict_a, dict_b = state_a.as_dict(packed=True), state_b.as_dict(packed=True)
            same = (
                same and set(dict_a) == set(dict_b) and all(torch.equal(dict_a[k], dict_b[k]) for k in dict_b)
            )
        if not same:
            differences.append(name)
    buffers_a, buffers_b = dict(ours.named_buffers()), dict(stock.named_buffers())
    if set(buffers_a) != set(buffers_b) or any(
        not torch.equal(buffers_a[k], buffers_b[k]) or buffers_a[k].dtype != buffers_b[k].dtype
        for k in buffers_b
    ):
        differences.append("buffers")
    return differences


def compare_all(rank, world, cases):
    return {label: compare(rank, world, path, **changes) for label, path, changes in cases}


def train(rank, world, path, loading, dtype):
    torch.manual_seed(5 + rank)
    loaded = engines.load(path, rank, world, 3, loading=loading, dtype=dtype, train_head=True)
    engine = engines.start(loaded, 3, world, dtype)
    losses = engines.train_steps(engine, rank, world, 0, 3)
    engine.eval()
    with torch.no_grad():  # AVX512-BF16 processors would repack the weights here and spoil the next step
        ids = torch.arange(3, 15)[None]
        first = float(engine(input_ids=ids, labels=ids).loss)
        again = float(engine(input_ids=ids, labels=ids).loss)
    engine.train()
    losses += engines.train_steps(engine, rank, world, 3, 4)
    return losses, loaded.lines, first == again


def plain_loss(rank, world, path):
    """Without DeepSpeed, NF4 on one process: the loss of the same untouched model."""
    loaded = load_model(engines.section(path), SimpleNamespace(device="cpu", rank=0, world=1), train=False)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return float(loaded.model(input_ids=ids, labels=ids).loss)


def sharded_loss(rank, world, path):
    import deepspeed

    loaded = engines.load(path, rank, world, 3)
    engine, *_ = deepspeed.initialize(
        model=loaded.model,
        config=engines.deepspeed_config(3, world),
        optimizer=torch.optim.AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=0.0),
    )
    engine.eval()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        return float(engine(input_ids=ids, labels=ids).loss)


def main(output, folder):
    folder, report = Path(folder), {"families": {}}
    cases = [(name, make_family(name, folder), {}) for name in FAMILIES]
    multimodal = [(name, family_models.make_family(name, folder), {}) for name in MULTIMODAL]
    extra = [
        ("llama_bf16_storage", folder / "llama", {"dtype": "bfloat16", "quant_storage": "bfloat16"}),
        ("llama_single_quant", folder / "llama", {"double_quant": False}),
        ("llama_not_quantised", folder / "llama", {"quantization": "none"}),
    ]
    stored = [
        ("llama_stored_4bit", store_in_four_bit(folder / "llama"), {}),
        ("gpt2_stored_4bit", store_in_four_bit(folder / "gpt2"), {}),
        ("llama_stored_4bit_single", store_in_four_bit(folder / "llama", double=False), {}),
    ]
    for world in (1, 2, 3):
        chosen = {1: cases[:1], 2: [cases[0], cases[-1], *extra], 3: cases + multimodal + extra[:1] + stored}[
            world
        ]
        for rank, result in enumerate(run_ranks(world, compare_all, chosen)):
            for label, differences in result.items():
                report["families"].setdefault(label, {})[f"world{world}_rank{rank}"] = differences
    tiny = engines.tiny_folder(folder, hidden=40, intermediate=56)
    for dtype in ("float32", "bfloat16"):
        both = {loading: run_ranks(2, train, tiny, loading, dtype) for loading in ("sharded", "stock")}
        report[f"train_{dtype}"] = {loading: [r[0] for r in results] for loading, results in both.items()}
        report[f"eval_repeatable_{dtype}"] = all(r[2] for results in both.values() for r in results)
        report["lines"] = both["sharded"][0][1]
    report["loss"] = {"sharded": run_ranks(3, sharded_loss, tiny), "plain": run_ranks(1, plain_loss, tiny)[0]}
    Path(output).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
