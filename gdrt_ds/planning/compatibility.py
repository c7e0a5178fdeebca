"""Combinations that are known to compute wrong results, hang or crash: refused before any weight is loaded.

Each refusal cites the threads in which users found it. docs/support-matrix.md is the same list for readers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch

from gdrt_ds.config import ModelSection, RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.new_tokens import HEADS
from gdrt_ds.models.quantization import Setting, get_quantization
from gdrt_ds.models.source import compute_dtype


def check_combination(
    config: RunConfig,
    deepspeed_config: dict[str, Any],
    *,
    cuda: bool | None = None,
    versions: dict[str, str] | None = None,
) -> None:
    """Checks the run config against the DeepSpeed config ("auto" values may still be in it).

    Args:
        cuda: whether the run has a GPU, which a plan may only expect; None = whether one is here.
        versions: package -> version; None = the installed ones.
    Raises:
        UserError: the first known bad combination, with thread numbers and the way out.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if versions is None:
        versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "bitsandbytes")}
    for problem, fix in refusals(config, deepspeed_config, cuda, versions):
        raise UserError(problem, fix)
    device = torch.device("cuda" if cuda else "cpu")
    if cuda and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    choose_attention(config.model.attention, device, compute_dtype(config.model.dtype, device))


def adapts_head(model: ModelSection) -> bool:
    """Whether lm_head gets an adapter: by `model.train_head`, or as one of `model.lora.targets`."""
    targets = model.lora.targets
    named = isinstance(targets, list) and any(name.rsplit(".", 1)[-1] in HEADS for name in targets)
    return model.train_head or named


def _token_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Trained rows of tokens beside other parts."""
    model = config.model
    if model.new_tokens and not model.lora.trainable_tokens:
        yield (
            f"model.new_tokens = {model.new_tokens!r}, and nothing trains the rows of the new tokens",
            "set model.lora.trainable_tokens=added",
        )
    if model.lora.trainable_tokens and adapts_head(model):
        yield (
            "model.lora.trainable_tokens with an adapter on lm_head (model.train_head = true, or lm_head in "
            "model.lora.targets): PEFT wraps lm_head either for rows of tokens or for an adapter",
            "set model.train_head=false and leave lm_head out of model.lora.targets: lm_head learns the rows "
            "of these tokens",
        )
    if model.lora.trainable_tokens and (
        config.groups.reference == "auxiliary_sft" or config.dro.excess_adapter
    ):
        yield (
            "model.lora.trainable_tokens with a reference adapter (groups.reference=auxiliary_sft or "
            "dro.excess=FOLDER): the trained rows would stay in the reference",
            "set groups.reference to base, corpus or live, and dro.excess to anything but a folder",
        )


def refusals(
    config: RunConfig, deepspeed_config: dict[str, Any], cuda: bool, versions: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Yields (problem, fix) of every bad combination that is found."""
    model = config.model
    zero = deepspeed_config.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))
    dtype = compute_dtype(model.dtype, torch.device("cuda" if cuda else "cpu"))

    deepspeed_version = _version(versions["deepspeed"])
    if deepspeed_version == (0, 19, 2):
        yield (
            "deepspeed 0.19.2 mixes up dtypes of frozen and trainable parameters (DeepSpeed #8066, #8072, "
            "#8073, #8113; TRL #6089)",
            "pip install 'deepspeed>=0.19.3'",
        )
    elif model.gradient_checkpointing and deepspeed_version < (0, 19, 3):
        yield (
            f"model.gradient_checkpointing = true with deepspeed {versions['deepspeed']}: non-reentrant "
            "recomputation with frozen parameters "
            "needs 0.19.3 (DeepSpeed #8130, #8148; transformers #47254)",
            "pip install 'deepspeed>=0.19.3', or switch it off",
        )
    setting = Setting(model, dtype, deepspeed_config, cuda, versions)
    yield from get_quantization(model.quantization).refusals(setting)
    for section, key in (
        ("weight_quantization", "quantized_initialization"),
        ("compression_training", "weight_quantization"),
    ):
        if (deepspeed_config.get(section) or {}).get(key):
            yield (
                f"the DeepSpeed config quantises weights itself ({section}.{key}); 8-bit weights under "
                "ZeRO-3 give wrong losses (bitsandbytes #1451)",
                f"remove {section}; model.quantization=nf4 is the supported way",
            )

    if stage not in (1, 2, 3):
        yield (
            f"zero_optimization.stage = {stage}: checkpoints and the exact optimizer state here need a "
            "sharded optimizer",
            "use ds_configs/zero1.json (on one rank it costs nothing), zero2.json or zero3_qlora.json",
        )
    if model.lora.dora and stage == 3:
        yield (
            "model.lora.dora = true with ZeRO stage 3: PEFT computes DoRA's norms from the base weight "
            "outside the base layer's forward, where ZeRO-3 has freed it",
            "use ds_configs/zero1.json or zero2.json, or set model.lora.dora=false",
        )
    if model.lora.dora and adapts_head(model):
        yield (
            "model.lora.dora = true with an adapter on lm_head (model.train_head = true, or lm_head in "
            "model.lora.targets): the fused loss and the catalogue scoring read lm_head row by row, and "
            "DoRA's scale of a row is not among what they read",
            "set model.lora.dora=false, or leave lm_head as it is",
        )
    if model.lora.targets == [] and not model.train_head:
        yield (
            "model.lora.targets is empty and model.train_head = false: no layer would get an adapter",
            "name layers, or set model.lora.targets=all-linear",
        )
    yield from _token_rows(config)
    if model.loading == "sharded" and stage != 3:
        yield (
            f"model.loading = sharded with ZeRO stage {stage}: only stage 3 shards parameters",
            "set model.loading to auto, or use ds_configs/zero3_qlora.json",
        )
    offload_param = (zero.get("offload_param") or {}).get("device", "none")
    offload_optimizer = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload_param != "none" and stage != 3:
        yield (
            f"offload_param.device = {offload_param} with ZeRO stage {stage}: only stage 3 can offload "
            "parameters",
            "use ds_configs/zero3_offload.json",
        )
    if offload_optimizer == "nvme":
        yield (
            "offload_optimizer.device = nvme: its state lives in swap files that checkpoints here do not "
            "carry",
            "LoRA's optimizer state is small: set it to cpu or none",
        )
    if config.train.on_nonfinite == "skip" and offload_optimizer != "none" and stage in (1, 2):
        yield (
            f"train.on_nonfinite = skip with offload_optimizer.device = {offload_optimizer} and ZeRO stage "
            f"{stage}: DeepSpeed adds the gradients of the skipped step, which wait in host memory, to those "
            "of the next (its `micro_step_id` is reset by a step alone)",
            "set train.on_nonfinite=stop, or use ds_configs/zero3_offload.json",
        )
    if not cuda and "cpu" in (offload_param, offload_optimizer):
        yield (
            "the DeepSpeed config offloads to the CPU, and there is no GPU to offload from",
            "use ds_configs/zero3_qlora.json or cpu.json",
        )

    if dtype == torch.float16 and not cuda:
        yield (
            "model.dtype = float16 without a GPU: DeepSpeed's fp16 mode has no CPU path",
            "set model.dtype to auto (float32 on CPU)",
        )
    for section in ("amp", "torch_autocast"):
        if (deepspeed_config.get(section) or {}).get("enabled"):
            yield (
                f"{section} in the DeepSpeed config makes a second dtype beside the adapter's (DeepSpeed "
                "#8066 family)",
                f"remove {section}; set model.dtype",
            )
    if (deepspeed_config.get("checkpoint") or {}).get("load_universal"):
        yield (
            "checkpoint.load_universal: universal checkpoints lose or mix state with frozen parameters "
            "(DeepSpeed #5475, #7585, #7599, #7601, #8099)",
            "remove it; checkpoints here resume on any world size by themselves",
        )
    if zero.get("elastic_checkpoint"):
        yield (
            "zero_optimization.elastic_checkpoint is not supported by ZeRO-3 and not needed here",
            "remove it",
        )
    optimizer = str((deepspeed_config.get("optimizer") or {}).get("type", "")).lower()
    if optimizer.startswith(("onebit", "zeroone")):
        yield (
            f"optimizer.type = {optimizer} compresses momenta outside ZeRO and does not combine with it",
            "remove the optimizer section, train.optimizer decides",
        )
    if deepspeed_config.get("pipeline") or int(deepspeed_config.get("sequence_parallel_size", 1) or 1) > 1:
        yield (
            "pipeline or sequence parallelism splits a sample over ranks; group losses here are sums over "
            "whole samples of each rank",
            "remove it from the DeepSpeed config",
        )


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)
