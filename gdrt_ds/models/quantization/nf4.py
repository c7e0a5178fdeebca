"""NF4 (QLoRA, arXiv 2305.14314): the linear layers are held in 4 bits by bitsandbytes, all but lm_head.

Blocks of 64 values share one scale. Double quantisation stores these scales in 8 bits too: they then take
0.127 instead of 0.5 bit per parameter.

prepare_model_for_kbit_training of PEFT is never called: with ZeRO-3 it casts sharded tensors (TRL #1416).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.quantization.base import Quantization, Setting, storage_dtype
from gdrt_ds.models.source import dtype_name

BLOCK = 64
"""Values that share one scale."""
NESTED_BLOCK = 256
"""Scales that share one scale of their own, under double quantisation."""


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer or an own subclass of it."""
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def describe(section: ModelSection, dtype: torch.dtype) -> str:
    """The line that a run announces."""
    double = " with double quantisation" if section.double_quant else ""
    storage = dtype_name(storage_dtype(section))
    return f"base: NF4{double}, stored as {storage}, computed in {dtype_name(dtype)}"


def bytes_of(section: ModelSection, dtype: torch.dtype, values: int) -> tuple[int, int]:
    """Bytes of the packed weights and of their scales."""
    blocks = values / BLOCK
    if section.double_quant:
        return values // 2, int(blocks * (1 + 4 / NESTED_BLOCK))
    return values // 2, int(blocks * 4)


def transformers_config(section: ModelSection, dtype: torch.dtype):
    """transformers' BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage_dtype(section),
    )


def refusals(setting: Setting) -> Iterator[tuple[str, str]]:
    """Combinations that destroy the packed weights silently, or that cannot run."""
    installed = setting.versions["bitsandbytes"]
    if not setting.cuda and _version(installed) < (0, 47):
        yield (
            f"model.quantization = nf4 on a CPU with bitsandbytes {installed}: NF4 runs on CPUs from 0.47 on",
            "pip install 'bitsandbytes>=0.50', or model.quantization=none",
        )
    text = dtype_name(setting.dtype)
    if storage_dtype(setting.model) not in (torch.uint8, setting.dtype):
        yield (
            f"model.quant_storage = {setting.model.quant_storage} with {text} arithmetic: the engine casts "
            f"floating tensors to {text} and so destroys the packed 4-bit weights silently (peft #2016; "
            "bitsandbytes #1249)",
            f"set model.quant_storage to auto (uint8) or to {text}",
        )
    zero = setting.deepspeed_config.get("zero_optimization") or {}
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            yield (
                f"zero_optimization.{key} = true would quantise packed 4-bit weights once more, as 8-bit "
                "(bitsandbytes #1451 is the same family)",
                f"remove {key} from the DeepSpeed config",
            )
    if int((setting.deepspeed_config.get("tensor_parallel") or {}).get("autotp_size", 1)) > 1:
        yield (
            "tensor_parallel.autotp_size > 1 splits matrices, packed 4-bit weights cannot be split by rows",
            "remove tensor_parallel, ZeRO-3 shards them",
        )


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version, e.g. (0, 50)."""
    parts = text.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def prepare(model: nn.Module) -> None:
    """Takes the own 4-bit linear layer, and turns bitsandbytes' in-place repacking of CPU weights off.

    The own layer does not keep a gathered weight alive from forward to backward (four_bit.py).
    On processors with AVX512-BF16, Linear4bit rewrites weight and quant_state for inference the first time it
    runs without gradient. Under ZeRO-3 the rewritten weight is freed after the forward while the rewritten
    quant_state stays, and every later forward is wrong. Without ZeRO-3 the scales are rounded to bfloat16.
    """
    from gdrt_ds.models.four_bit import use_four_bit_linear

    use_four_bit_linear(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantise(model: nn.Module) -> nn.Module:
    """Returns the same causal LM with ordinary layers that hold the values its 4-bit layers compute with."""
    for name, module in list(model.named_modules()):
        if is_4bit(module):
            model.set_submodule(name, _plain_layer(module))
    # What transformers did while it read packed weights it would undo when it saves the model, and cannot.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [kept for kept in conversions if not _unpacks(kept)]
    model.is_loaded_in_4bit = False
    model.is_quantized = False
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    return model


def _unpacks(conversion) -> bool:
    """Whether a weight conversion of transformers reads packed 4-bit weights."""
    operations = getattr(conversion, "operations", None) or []
    return any(type(operation).__name__.startswith("Bnb4bit") for operation in operations)


def _plain_layer(module: nn.Module) -> nn.Module:
    """nn.Linear, or GPT-2's Conv1D, with the values of one 4-bit layer in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.float32)
    if issubclass(module.source_cls, Conv1D):
        plain = Conv1D(module.out_features, module.in_features)
        weight = weight.t().contiguous()
    else:
        bias = module.bias is not None
        plain = nn.Linear(module.in_features, module.out_features, bias=bias, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = module.bias
    return plain


QUANTIZATION = Quantization(
    describe,
    bytes_of=bytes_of,
    refusals=refusals,
    transformers_config=transformers_config,
    prepare=prepare,
    dequantise=dequantise,
    loads_sharded=True,
)
