"""Loads a causal language model: NF4 base, LoRA adapter, attention choice; and finds its parts whatever
the family.

`resolve_model` turns `model.path` into a local folder, `load_model` returns the model with the lines to
announce.
`decoder`, `lm_head` and `lm_head_scaling` are how the loss and the evaluator reach hidden states and the
output matrix without building logits; they work wrapped by PEFT or DeepSpeed or not.

prepare_model_for_kbit_training is never called: with ZeRO-3 it casts sharded tensors (TRL #1416). LoRA
weights are kept in the compute dtype, so that the engine holds one trainable dtype.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import SMOLLM2_NAME, TINY_NAME, make_tiny_model, smollm2_folder
from gdrt_ds.models.quantization import quant_storage, quantization_config

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
FINGERPRINT_WINDOW_BYTES, FINGERPRINT_WINDOWS = 1 << 16, 64
# Random features this wide let adapters alone learn the planted rule; at 0.05 they need several times the
# steps
TINY_STD = 0.2


@dataclass
class LoadedModel:
    """A model ready for the trainer or the evaluator.

    Attributes:
        model: PEFT model over a causal LM (train, or with an adapter), or the plain causal LM.
        tokenizer: its tokenizer, with a pad token.
        lines: what was chosen and why, one line each; rank 0 prints them.
        path: local folder of the base.
        fingerprint: of the frozen base and how it is stored (`base_fingerprint`).
        attention: name of the attention implementation in use.
        loading: "sharded" or "stock".
        dtype: compute dtype.
    """

    model: nn.Module
    tokenizer: Any
    lines: list[str] = field(default_factory=list)
    path: Path = Path()
    fingerprint: str = ""
    attention: str = ""
    loading: str = "stock"
    dtype: torch.dtype = torch.float32


def resolve_model(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tiny_folder: str | Path | None = None,
    texts: list[str] | None = None,
    seed: int = 0,
) -> Path:
    """Local folder of a model.

    Args:
        path: folder, hub name, `smollm2-135m` or `tiny-random`.
        tiny_folder, texts, seed: where and from which texts `tiny-random` is made.
    Raises:
        UserError: nothing there, or the hub cannot be reached.
    """
    if path == SMOLLM2_NAME:
        return smollm2_folder()
    if path == TINY_NAME:
        if tiny_folder is None or not texts:
            raise UserError(
                f"model.path = {TINY_NAME} needs the texts of a corpus and a folder",
                "give model.path a folder here",
            )
        return make_tiny_model(tiny_folder, texts, seed, std=TINY_STD)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = (
                "that is an adapter: give its base as model.path"
                if (folder / "adapter_config.json").is_file()
                else "it has no config.json"
            )
            raise UserError(
                f"model.path = {path} is not a model folder ({hint})",
                "give the folder that transformers' save_pretrained wrote",
            )
        return folder.resolve()
    if folder.exists():
        raise UserError(
            f"model.path = {path} is a file", "give the folder that holds config.json and the safetensors"
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path = {path}: no such folder",
            f"give a folder, a hub name (owner/name), {SMOLLM2_NAME} or {TINY_NAME}",
        )
    return _download(path, revision, trust_remote_code)


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetches a hub model; the hub client locks files, so ranks of one machine share one download."""
    from huggingface_hub import snapshot_download

    patterns = HUB_PATTERNS + (["*.py"] if trust_remote_code else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client's own errors (missing, gated, offline) derive from many bases
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.path = {name}: neither a local folder nor reachable on the hub ({type(error).__name__}: "
            f"{reason})",
            "check the name, log in if the model is gated, or download it elsewhere and give the folder",
        ) from None


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder; a missing pad token becomes the end token (padding is masked, never
    trained on).

    Raises:
        UserError: no readable tokenizer, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"no readable tokenizer in {path} ({_first_line(error)})",
            "set model.tokenizer to a folder or hub name that has one",
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token", "set model.tokenizer to one that has"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_model_config(path: Path, *, trust_remote_code: bool = False):
    """The transformers config of a folder.

    Raises:
        UserError: unreadable, not a causal language model, or a pre-quantised checkpoint that QLoRA cannot
        take.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"model folder {path} is not readable ({_first_line(error)})",
            "check config.json; a newer architecture may need a newer transformers",
        ) from None
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = (
            quantized.get("quant_method")
            if isinstance(quantized, dict)
            else getattr(quantized, "quant_method", "unknown")
        )
        if isinstance(quantized, dict) and quantized.get("load_in_8bit"):
            raise UserError(
                f"{path} holds 8-bit weights: 8-bit under ZeRO-3 computes wrong losses (bitsandbytes #1451)",
                "give the unquantised model; it is quantised to NF4 while loading",
            )
        raise UserError(
            f"{path} is already quantised ({method})",
            "give the unquantised model; it is quantised to NF4 while loading",
        )
    return config


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`model.dtype` as a torch dtype; auto = bfloat16 on GPU, float32 on CPU: bfloat16 is faster only
    where the CPU has avx512_bf16 or AMX, and slower elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def model_class(config):
    """The transformers class of a causal LM config, None for remote code."""
    from transformers import AutoModelForCausalLM

    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, (tuple, list)) else found


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, architecture=None
) -> tuple[str, str]:
    """(implementation, line to announce). `architecture` is the model class; Gemma-2 caps its scores,
    which SDPA cannot.

    Raises:
        UserError: a requested kernel that is not installed, or does not run on this device or dtype.
    """
    modules = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    installed = {name: importlib.util.find_spec(module) is not None for name, module in modules.items()}
    half = dtype in (torch.bfloat16, torch.float16)
    if (
        architecture is not None
        and not architecture._supports_sdpa
        and requested in ("auto", "sdpa", "flex_attention")
    ):
        if requested != "auto":
            raise UserError(
                f"model.attention = {requested}: {architecture.__name__} does not support it",
                "set model.attention to auto or eager",
            )
        if device.type != "cuda" or not half or not installed["flash_attention_2"]:
            return "eager", f"attention: eager (auto: {architecture.__name__} does not run on SDPA)"
    if requested == "auto":
        if device.type != "cuda":
            return "sdpa", f"attention: sdpa (auto: flash-attn needs a GPU, this is {device.type})"
        for name in ("flash_attention_3", "flash_attention_2"):
            right_gpu = name == "flash_attention_2" or torch.cuda.get_device_capability(device)[0] == 9
            if installed[name] and half and right_gpu:
                return name, f"attention: {name} (auto: {modules[name]} is importable)"
        why = (
            f"dtype {str(dtype).removeprefix('torch.')} is not 16 bit"
            if not half
            else "flash-attn is not installed"
        )
        return "sdpa", f"attention: sdpa (auto: {why})"
    if requested in modules:
        if device.type != "cuda" or not half:
            raise UserError(
                f"model.attention = {requested} runs on a GPU in bfloat16 or float16, here {device.type} in "
                f"{str(dtype).removeprefix('torch.')}",
                "set model.attention to auto or sdpa",
            )
        if not installed[requested]:
            raise UserError(
                f"model.attention = {requested}: {modules[requested]} is not installed",
                "pip install flash-attn, or set model.attention to auto",
            )
    return requested, f"attention: {requested} (as set)"


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
        runtime: anything with `.device`, `.rank`, `.world`.
        train: adds a fresh LoRA adapter (seeded, the same on every rank) and turns the cache off.
        path: folder if resolved already (needed for `tiny-random`).
        adapter: PEFT folder to load; with train=False it is frozen.
        attention: implementation that replaces the choice of `model.attention`, e.g. the registered tree
            attention; a model that cannot run on SDPA keeps its own (see `LoadedModel.attention`).
        deepspeed_config: filled DeepSpeed config; with ZeRO stage 3 and `model.loading` auto or sharded,
            every rank reads only its own slice (sharded_loading.py). None = stock loading.
    Raises:
        UserError: anything about the folder, the settings or their combination.
    """
    path = path or resolve_model(
        section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    device = torch.device(runtime.device)
    dtype = compute_dtype(section.dtype, device)
    config = read_model_config(path, trust_remote_code=section.trust_remote_code)
    tokenizer_path = smollm2_folder() if section.tokenizer == SMOLLM2_NAME else section.tokenizer or path
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=section.trust_remote_code)
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"{config.get_text_config().vocab_size} rows",
            "set model.tokenizer to the model's own; embeddings are not resized under ZeRO-3 (DeepSpeed "
            "#7669)",
        )
    architecture = model_class(config)
    chosen, line = choose_attention(section.attention, device, dtype, architecture)
    if (
        attention is not None
        and chosen != attention
        and architecture is not None
        and not architecture._supports_sdpa
    ):
        line += f"; {attention} is left out, it builds on SDPA"
    elif attention is not None and chosen != attention:
        line = f"attention: {attention} in place of {chosen}"
        chosen = attention
    lines = [line]
    model, loading = None, "stock"
    stage = ((deepspeed_config or {}).get("zero_optimization") or {}).get("stage", 0)
    if section.loading == "sharded" and stage != 3:
        raise UserError(
            f"model.loading = sharded needs ZeRO stage 3, the DeepSpeed config has stage {stage}",
            "set model.loading to auto or stock",
        )
    if section.loading != "stock" and stage == 3:
        from gdrt_ds.models.sharded_loading import CannotShard, load_sharded

        try:
            model = load_sharded(path, config, section, dtype, chosen, device, deepspeed_config)
            loading = "sharded"
            lines.append("loading: sharded (each rank reads and keeps only its slice)")
        except CannotShard as reason:
            if section.loading == "sharded":
                raise UserError(
                    f"model.loading = sharded: {reason}", "set model.loading to auto or stock"
                ) from None
            lines.append(f"loading: stock, the whole model on every rank first ({reason})")
    else:
        lines.append(f"loading: stock ({'as set' if section.loading == 'stock' else 'no ZeRO-3 here'})")
    if model is None:
        model = load_stock(path, config, section, dtype, chosen, device)
    prepare_quantized_modules(model)
    model.requires_grad_(False)
    if section.quantization == "nf4":
        storage = str(quant_storage(section)).removeprefix("torch.")
        lines.append(
            f"base: NF4{' with double quantisation' if section.double_quant else ''}, stored as {storage}, "
            f"computed in {str(dtype).removeprefix('torch.')}"
        )
    else:
        lines.append(f"base: {str(dtype).removeprefix('torch.')}, not quantised")
    if train or adapter is not None:
        model, text = add_adapter(model, section, path, dtype, seed, adapter, train)
        lines.append(text)
    if train:
        model.config.use_cache = False
        if section.gradient_checkpointing:
            decoder(model)  # fails early, with words, for a model whose parts are not found
            unwrap(model).gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            lines.append("activations: recomputed in backward (non-reentrant checkpointing)")
        if section.compile:
            for layer in decoder_layers(model):
                layer.compile()
            lines.append("torch.compile: every decoder layer, compiled at its first use")
    model.train(train)
    fingerprint = base_fingerprint(path, section, dtype)
    return LoadedModel(model, tokenizer, lines, path, fingerprint, chosen, loading, dtype)


def load_stock(
    path: Path, config, section: ModelSection, dtype: torch.dtype, attention: str, device: torch.device
) -> nn.Module:
    """transformers' own loading: the whole (quantised) model on this rank's device.

    Raises:
        UserError: unreadable, truncated or missing weights; weights that are not safetensors.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"model folder {path} has no .safetensors weights",
            "convert them with transformers' save_pretrained(safe_serialization=True); pickles are not read",
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config(section, dtype),
            attn_implementation=attention,
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model folder {path} cannot be loaded ({type(error).__name__}: {_first_line(error)})",
            "check that its files are complete (sizes, safetensors index) and that this transformers knows "
            "the architecture",
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model folder {path} lacks {len(missing)} weights, e.g. {missing[0]}",
            "the download is incomplete, or config.json belongs to another model",
        )
    return model


def prepare_quantized_modules(model: nn.Module) -> None:
    """Turns bitsandbytes' in-place repacking of CPU weights off.

    On processors with AVX512-BF16, Linear4bit rewrites weight and quant_state for inference the first time
    it runs without gradient. Under ZeRO-3 the rewritten weight is freed after the forward while the
    rewritten quant_state stays, and every later forward is wrong; without ZeRO-3 the scales are rounded to
    bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(
    model: nn.Module,
    section: ModelSection,
    path: Path,
    dtype: torch.dtype,
    seed: int,
    adapter: str | Path | None,
    train: bool,
) -> tuple[nn.Module, str]:
    """(PEFT model, line): a fresh seeded LoRA, or the adapter of a folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise UserError(
                f"{adapter} is not a PEFT adapter (no adapter_config.json)",
                "give the adapter folder of a run",
            )
        try:
            peft_model = PeftModel.from_pretrained(
                model, str(adapter), is_trainable=train, autocast_adapter_dtype=False
            )
        except Exception as error:
            raise UserError(
                f"adapter {adapter} does not fit {path} ({_first_line(error)})",
                "give the base model it was trained on",
            ) from None
        _cast_adapter(peft_model, dtype)
        return peft_model, f"adapter: {adapter}"
    targets = section.lora.targets
    linear = linear_names(model)
    head_name = next(
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    )
    if targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[-1] for name in linear if name != head_name})
    unknown = [t for t in targets if not any(name == t or name.endswith("." + t) for name in linear)]
    if unknown:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(
            f"model.lora.targets names {unknown[0]}, which {type(model).__name__} does not have",
            f"choose among {', '.join(known)}, or all-linear",
        )
    if section.train_head:
        targets = [*targets, head_name]
    lora = LoraConfig(
        r=section.lora.r,
        lora_alpha=section.lora.alpha,
        lora_dropout=section.lora.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    is_hub_name = not Path(section.path).exists() and section.path not in (SMOLLM2_NAME, TINY_NAME)
    peft_model.peft_config["default"].base_model_name_or_path = section.path if is_hub_name else str(path)
    peft_model.peft_config["default"].revision = section.revision
    _cast_adapter(peft_model, dtype)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in peft_model.parameters() if p.requires_grad)
    return peft_model, (
        f"adapter: LoRA r={section.lora.r} alpha={section.lora.alpha:g} dropout={section.lora.dropout:g} on "
        f"{', '.join(targets)}; {trainable:,} trainable parameters in {str(dtype).removeprefix('torch.')}"
    )


def _cast_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def linear_names(model: nn.Module) -> list[str]:
    """Names of all modules that LoRA can adapt: Linear, its 4-bit form, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM itself, out of a DeepSpeed engine, torch.compile and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif model.__class__.__name__ in ("DeepSpeedEngine", "DistributedDataParallel") and hasattr(
            model, "module"
        ):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def decoder(model: nn.Module) -> nn.Module:
    """The backbone: called with input_ids it returns `last_hidden_state` [B, T, H] after the final norm."""
    base = unwrap(model)
    backbone = base.base_model
    if backbone is base or backbone is None:
        backbone = base.get_decoder()
    if backbone is base or backbone is None:
        raise UserError(
            f"{type(base).__name__}: its decoder is not found",
            "use a causal language model of transformers (Llama, Qwen, Mistral, Gemma, Phi, GPT-2 ...)",
        )
    return backbone


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks."""
    lists = [m for m in decoder(model).modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"{type(unwrap(model)).__name__}: its layers are not found", "set model.compile to false"
        )
    return max(lists, key=lambda layers: sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters()))


def lm_head(model: nn.Module) -> nn.Module:
    """The output projection [V, H]: nn.Linear, or PEFT's LoRA layer around it.

    Some families (Phi-2) have a bias.
    """
    module = unwrap(model).get_output_embeddings()
    if module is None:
        raise UserError(f"{type(unwrap(model)).__name__} has no output head", "use a causal language model")
    return module


def lm_head_scaling(config) -> tuple[float, float | None]:
    """(logit_scale, softcap): logits = softcap * tanh(scale * (W h + b) / softcap), softcap None = no cap.

    Gemma-2 caps its logits; Cohere multiplies them, Granite and MiniCPM-like families divide.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        scale /= float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None) is not None:
        scale *= float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def base_fingerprint(
    path: Path, section: ModelSection | None = None, dtype: torch.dtype | None = None
) -> str:
    """sha256 over the frozen base: of every weight file its size, header and 64 windows of 64 KiB spread
    over it; and how it is stored.

    Small files are covered whole; of a 140 GB model 4 MiB per file are read, which a different or
    retrained model cannot match.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(min(header, size)))
            step = max((size - FINGERPRINT_WINDOW_BYTES) // FINGERPRINT_WINDOWS, FINGERPRINT_WINDOW_BYTES)
            for start in [*range(0, size, step), max(size - FINGERPRINT_WINDOW_BYTES, 0)]:
                handle.seek(start)
                digest.update(handle.read(FINGERPRINT_WINDOW_BYTES))
    if section is not None:
        stored = [section.quantization, section.double_quant, str(quant_storage(section)), str(dtype)]
        digest.update(json.dumps(stored).encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def model_size_bytes(path: Path) -> int:
    """Bytes of the safetensors files of a folder."""
    return sum(os.path.getsize(file) for file in Path(path).glob("*.safetensors"))
