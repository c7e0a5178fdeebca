"""Loads a causal language model in the order of events: settings, attention, weights, adapter.

`load_model` returns the model together with the lines to announce: what was chosen, and why. The steps are in
files of their own: source.py (folder, tokenizer, config), attention/, quantization/, stock_loading.py and
sharded_loading.py (weights), adapters.py (LoRA), families.py (the parts of any model), fingerprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.adapters import load_adapter, new_adapter
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.families import (
    decoder,
    decoder_layers,
    fused_experts_line,
    model_class,
    supports_sdpa,
    unwrap,
)
from gdrt_ds.models.fingerprint import base_fingerprint
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.sharded_loading import CannotShard, load_sharded
from gdrt_ds.models.source import (
    compute_dtype,
    dtype_line,
    load_tokenizer,
    read_model_config,
    resolve_model,
    tokenizer_source,
)
from gdrt_ds.models.stock_loading import load_stock
from gdrt_ds.models.stored_four_bit import compute_in, stored_four_bit


@dataclass
class LoadedModel:
    """A model ready for the trainer or the evaluation.

    Attributes:
        model: a PEFT model around a causal LM (in training, or with an adapter), or the plain causal LM.
        tokenizer: its tokenizer, with a pad token.
        lines: what was chosen and why, one line each; rank 0 prints them.
        path: local folder of the base.
        fingerprint: of the frozen base and how it is stored (`base_fingerprint`).
        attention: transformers' name of the attention in use.
        loading: "sharded" or "stock".
        dtype: dtype of the computation.
    """

    model: nn.Module
    tokenizer: Any
    lines: list[str] = field(default_factory=list)
    path: Path = Path()
    fingerprint: str = ""
    attention: str = ""
    loading: str = "stock"
    dtype: torch.dtype = torch.float32


def load_model(
    section: ModelSection,
    runtime,
    *,
    train: bool,
    path: Path | None = None,
    seed: int = 0,
    adapter: str | Path | None = None,
    attention: str | None = None,
    deepspeed_config: dict | None = None,
) -> LoadedModel:
    """Loads base, tokenizer and adapter.

    Args:
        section: settings of the model.
        runtime: anything with `.device`, `.rank`, `.world`.
        train: adds a fresh LoRA adapter (seeded, the same on every rank) and turns the key-value cache off.
        path: folder of the base if it is resolved already, which `tiny-random` needs.
        seed: seed of the fresh adapter.
        adapter: PEFT folder to load instead; with train=False it is frozen.
        attention: transformers' name of an attention that replaces the choice of `model.attention`, e.g. the
            registered tree attention. A model that cannot run on SDPA keeps its own.
        deepspeed_config: the filled DeepSpeed config. With ZeRO stage 3 and `model.loading` auto or sharded,
            every rank reads only its own slice (sharded_loading.py). None = stock loading.

    Raises:
        UserError: anything about the folder, the settings or their combination.
    """
    if path is None:
        path = resolve_model(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    device = torch.device(runtime.device)
    dtype = compute_dtype(section.dtype, device)
    config = read_model_config(path, trust_remote_code=section.trust_remote_code)
    stored = stored_four_bit(config)
    if stored is not None:
        config = compute_in(config, section, dtype)
    tokenizer = load_tokenizer(tokenizer_source(section, path), trust_remote_code=section.trust_remote_code)
    spare_line = check_vocabulary(tokenizer, config)
    chosen, attention_line = _attention(section, device, dtype, config, attention)
    model, loading, loading_line = _load_weights(
        path, config, section, dtype, chosen, device, deepspeed_config
    )
    quantization = get_quantization(section.quantization)
    quantization.prepare(model)
    model.requires_grad_(False)
    base_line = quantization.describe(section, dtype) if stored is None else stored.describe(dtype)
    lines = [attention_line, loading_line, base_line, dtype_line(section.dtype, device)]
    lines += [spare_line] if spare_line else []
    if quantization.bytes_of is not None:
        experts = fused_experts_line(model, dtype)
        lines += [experts] if experts else []
    if adapter is not None:
        model, line = load_adapter(model, adapter, path, dtype, train)
        lines.append(line)
    elif train:
        model, line = new_adapter(model, section, path, dtype, seed, tokenizer)
        lines.append(line)
    if train:
        lines += _prepare_training(model, section)
    model.train(train)
    fingerprint = base_fingerprint(path, section, dtype)
    return LoadedModel(model, tokenizer, lines, path, fingerprint, chosen, loading, dtype)


def check_vocabulary(tokenizer, config) -> str:
    """Looks for tokens that the model has no embedding for; returns a line about those that never occur.

    The tokenizer of Gemma-3-1b has such a token, which stands for an image (transformers #37011), and that of
    CodeLlama-34b has four (transformers #26714). They are special, and text of the data never becomes a
    special token.

    Raises:
        UserError: text can become one of them, or prompts need it.
    """
    rows = config.get_text_config().vocab_size
    if len(tokenizer) <= rows:
        return ""
    without = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    added = tokenizer.added_tokens_decoder
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    wrong = [
        token
        for token, number in without.items()
        if number in needed or number not in added or not added[number].special
    ]
    if wrong:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: {wrong[0]!r} has "
            "none",
            "set model.tokenizer to the model's own, or name new tokens in model.new_tokens; embeddings are "
            "not resized under ZeRO-3 (DeepSpeed #7669)",
        )
    if not without:
        return ""
    names = ", ".join(sorted(without)[:3])
    return f"tokenizer: special tokens without a row in the embedding never occur: {names}"


def _attention(
    section: ModelSection, device: torch.device, dtype: torch.dtype, config, replacement: str | None
) -> tuple[str, str]:
    """Returns transformers' name of the attention, and the line to announce."""
    architecture = model_class(config)
    chosen, line = choose_attention(section.attention, device, dtype, architecture)
    if replacement is None or replacement == chosen:
        return chosen, line
    if not supports_sdpa(architecture):
        return chosen, f"{line}; {replacement} is left out, it builds on SDPA"
    return replacement, f"attention: {replacement} in place of {chosen}"


def _load_weights(
    path: Path,
    config,
    section: ModelSection,
    dtype: torch.dtype,
    attention: str,
    device: torch.device,
    deepspeed_config: dict | None,
) -> tuple[nn.Module, str, str]:
    """Returns the base, "sharded" or "stock", and the line to announce."""
    stage = ((deepspeed_config or {}).get("zero_optimization") or {}).get("stage", 0)
    if section.loading == "sharded" and stage != 3:
        raise UserError(
            f"model.loading = sharded needs ZeRO stage 3, the DeepSpeed config has stage {stage}",
            "set model.loading to auto or stock",
        )
    if section.loading == "stock" or stage != 3:
        why = "as set" if section.loading == "stock" else "no ZeRO-3 here"
        model = load_stock(path, config, section, dtype, attention, device)
        return model, "stock", f"loading: stock ({why})"
    try:
        model = load_sharded(path, config, section, dtype, attention, device, deepspeed_config)
        return model, "sharded", "loading: sharded (each rank reads and keeps only its slice)"
    except CannotShard as reason:
        if section.loading == "sharded":
            raise UserError(
                f"model.loading = sharded: {reason}", "set model.loading to auto or stock"
            ) from None
        line = f"loading: stock, the whole model on every rank first ({reason})"
    return load_stock(path, config, section, dtype, attention, device), "stock", line


def _prepare_training(model: nn.Module, section: ModelSection) -> list[str]:
    """Turns recomputation and compilation on where they are set; returns the lines to announce."""
    lines = []
    model.config.use_cache = False
    if section.gradient_checkpointing:
        decoder(model)  # fails early, with words, for a model whose parts are not found
        unwrap(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lines.append("activations: recomputed in backward (non-reentrant checkpointing)")
    if section.compile:
        for layer in decoder_layers(model):
            layer.compile()
        lines.append("torch.compile: every decoder layer, compiled at its first use")
    return lines
