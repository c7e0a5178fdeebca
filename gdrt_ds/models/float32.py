"""A loaded model is made to compute in float32, whatever dtype it was trained in.

Ranks must not hang on rounding: in bfloat16 the same title scored in two ways differs by tenths of a nat. The
values of the weights stay those that were trained; only the arithmetic on them changes. There are two forms:

- whole: every weight is held in float32, and a 4-bit base is dequantised once. It is the fast form.
- as used: 4-bit weights stay packed, matrices and embeddings stay in 16 bits, and each is converted when it
  is multiplied. It needs next to no memory beyond what the model has already.

The form is whole where the memory that it adds is at most half of what is free on the device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.attention import takes_dense_masks
from gdrt_ds.models.families import decoder, supports_sdpa, unwrap
from gdrt_ds.models.load import LoadedModel
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.quantization.nf4 import is_4bit
from gdrt_ds.models.source import dtype_name
from gdrt_ds.runtime.devices import free_bytes

HALF = (torch.bfloat16, torch.float16)
SHARE = 0.5
"""Part of the free memory that float32 may take: activations and the prompts' keys need the rest."""


class LinearAsUsed(nn.Linear):
    """A linear layer whose weight stays in 16 bits and is converted for each product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if bias is not None:
            bias = bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class EmbeddingAsUsed(nn.Embedding):
    """An embedding whose rows are converted when they are read."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).float()


AS_USED = {nn.Linear: LinearAsUsed, nn.Embedding: EmbeddingAsUsed}


def to_float32(loaded: LoadedModel, section: ModelSection, runtime) -> tuple[LoadedModel, bool, str]:
    """Makes a model compute in float32, in place.

    Args:
        loaded: in the dtype that it was trained in, with its adapter.
        section: settings that it was loaded with.
        runtime: anything with `.device`; `.local_world` processes share the memory of the machine.

    Returns:
        the model, whether its weights are whole in float32 (an adapter can be merged into them without
        rounding), and the line to announce. Where even the second form does not fit, the model stays as it
        is, and its `dtype` says so.
    """
    before = dtype_name(loaded.dtype)
    free = free_bytes(torch.device(runtime.device)) // max(1, getattr(runtime, "local_world", 1))
    whole = added_bytes(loaded.model)
    if whole <= free * SHARE:
        _make_whole(loaded.model, section)
        how = f"trained in {before}; weights held in float32, {_size(whole)} more"
        return _done(loaded), True, f"scoring: in float32 ({how})"
    least = added_bytes(loaded.model, as_used=True)
    if least <= free * SHARE:
        _make_as_used(loaded.model)
        how = f"trained in {before}; weights converted as they are used: {_size(whole)} do not fit"
        return _done(loaded), False, f"scoring: in float32 ({how} half of the free {_size(free)})"
    line = (
        f"scoring: in {before}, as trained, because float32 needs {_size(least)} more and {_size(free)} are "
        "free; the check below says how exact that is"
    )
    return loaded, False, line


def added_bytes(model: nn.Module, as_used: bool = False) -> int:
    """Returns the bytes by which a model grows when it is made float32, in one of the two forms."""
    kept: set[int] = set()
    if as_used:
        kept = {id(module.weight) for module in _large_layers(model)}
    added = 0
    for parameter in model.parameters():
        if id(parameter) in kept:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            added += 4 * state.shape.numel() - parameter.nbytes
        elif parameter.dtype in HALF:
            added += (4 - parameter.element_size()) * parameter.numel()
    return added


def _make_whole(model: nn.Module, section: ModelSection) -> None:
    get_quantization(section.quantization).dequantise(unwrap(model))
    model.float()


def _large_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights may stay as they are: packed ones, matrices and embeddings in 16 bits.

    PEFT rounds the input of an adapter to the dtype of its weights, so adapters are held in float32.
    """
    return [
        module
        for name, module in model.named_modules()
        if is_4bit(module)
        or (type(module) in AS_USED and module.weight.dtype in HALF and ".lora_" not in name)
    ]


def _make_as_used(model: nn.Module) -> None:
    kept = set()
    for module in _large_layers(model):
        kept.add(id(module.weight))
        if is_4bit(module):
            module.compute_dtype = torch.float32
            module.weight.quant_state.dtype = torch.float32
        else:
            module.__class__ = AS_USED[type(module)]
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in kept and tensor.dtype in HALF:
            tensor.data = tensor.data.float()


def _done(loaded: LoadedModel) -> LoadedModel:
    """The loaded model, whose attention can take float32."""
    core = decoder(loaded.model)
    attention = loaded.attention
    if not takes_dense_masks(core.config._attn_implementation):  # flash kernels take 16 bits only
        attention = "sdpa" if supports_sdpa(type(unwrap(loaded.model))) else "eager"
        core.set_attn_implementation(attention)
    loaded.model.eval()
    return replace(loaded, dtype=torch.float32, attention=attention)


def _size(num_bytes: float) -> str:
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.1f} GiB"
    return f"{num_bytes / (1 << 20):.0f} MiB"
