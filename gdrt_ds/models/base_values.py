"""The values that a base computes with, tensor by tensor, straight from its weight files.

No model is loaded: a skeleton without storage says which parameters there are, and each is read when it is
asked for. A 4-bit base is quantised and dequantised in the same way, so the values are those of its layers.
So is a base that is held in 16 bits: its values are rounded first.

Values are float32 in the shape of the skeleton's parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.attention import choose_attention
from gdrt_ds.models.families import model_class
from gdrt_ds.models.quantised_slices import PIECE, dequantised_pieces, quant_state_of, quantize_range
from gdrt_ds.models.quantization.nf4 import is_4bit
from gdrt_ds.models.sharded_loading import CannotShard, build_skeleton, match_names
from gdrt_ds.models.source import dtype_name
from gdrt_ds.models.stored_four_bit import is_packed, read_quant_state, stored_four_bit
from gdrt_ds.models.weight_files import WeightFiles

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the skeleton.

    Attributes:
        module: the module that holds it; PEFT may wrap it later.
        leaf: its name there.
        tensor: as the skeleton was built: its shape and dtype count.
    """

    module: nn.Module
    leaf: str
    tensor: Tensor


@dataclass
class BaseValues:
    """A base on disk.

    Attributes:
        model: its skeleton of ordinary layers; parameters are on the meta device, buffers are real.
        places: every parameter and persistent buffer, in the order of the model's state.
        files: the stored tensors.
        sources: parameter or persistent buffer -> its name in the files; tied ones share one.
        packed: weights that are held in 4 bits -> whether the file has them transposed (GPT-2's Conv1D).
        double_quant: whether the block scales are quantised too.
        dtype: in which the base is held: values are rounded to it, and quantised from it.
    """

    model: nn.Module
    places: dict[str, Place]
    files: WeightFiles
    sources: dict[str, str]
    packed: dict[str, bool]
    double_quant: bool
    dtype: torch.dtype = torch.float32

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yields the values of a parameter or buffer in order, flat.

        What is not a float keeps its dtype.
        """
        source = self.sources[name]
        if name in self.packed:
            yield from self._dequantised(source, name)
            return
        numel = self.files.tensors[source].numel
        for start in range(0, numel, PIECE):
            values = self.files.read(source, start, min(start + PIECE, numel))
            yield values.to(self.dtype).float() if values.is_floating_point() else values

    def whole(self, name: str) -> Tensor:
        """Returns the values in the shape that the skeleton has."""
        return gather(self.pieces(name), self.places[name].tensor.shape)

    def _dequantised(self, source: str, name: str) -> Iterator[Tensor]:
        shape = self.places[name].tensor.shape
        transposed = self.packed[name]
        if transposed:
            shape = shape[::-1]
        if is_packed(self.files, source):
            state = read_quant_state(self.files, source, CPU)
            packed = self.files.read(source).view(torch.uint8)
        else:
            packed, state = self._quantised(source, torch.Size(shape), transposed)
        pieces = (piece.float() for piece in dequantised_pieces(packed, state))
        if not transposed:
            yield from pieces
            return
        yield torch.cat(list(pieces)).view(shape).t().reshape(-1)

    def _quantised(self, source: str, shape: torch.Size, transposed: bool):
        """Packed bytes and quant_state of a weight [out, in]."""

        def read(start: int, stop: int) -> Tensor:
            return self.files.read(source, start, stop)

        if transposed:
            stored = self.files.tensors[source].shape
            values = self.files.read(source).view(stored).t().reshape(-1)

            def read(start: int, stop: int) -> Tensor:
                return values[start:stop]

        packed, absmax = quantize_range(read, 0, shape.numel(), self.dtype, CPU)
        return packed, quant_state_of(absmax, shape, self.double_quant, self.dtype, CPU)


def gather(pieces: Iterable[Tensor], shape: torch.Size) -> Tensor:
    """Returns flat pieces as one tensor; beside it, one piece is in memory at a time."""
    values = torch.empty(0)
    place = 0
    for piece in pieces:
        if place == 0:
            values = torch.empty(shape.numel(), dtype=piece.dtype)
        values[place : place + len(piece)] = piece
        place += len(piece)
    return values.view(shape)


def blocks_of(pieces: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Yields flat pieces of any lengths again as blocks of `size` values; the last one may be shorter."""
    block = None
    filled = 0
    for piece in pieces:
        while len(piece):
            if block is None:
                block = torch.empty(size, dtype=piece.dtype)
            part = piece[: size - filled]
            block[filled : filled + len(part)] = part
            filled += len(part)
            piece = piece[len(part) :]
            if filled == size:
                yield block
                block = None
                filled = 0
    if block is not None:
        yield block[:filled]


def open_base(path: Path, config, section: ModelSection, dtype: torch.dtype = torch.float32) -> BaseValues:
    """Opens a base whose values are those of `section.quantization`, held in `dtype`.

    Args:
        path: folder of the base.
        config: its transformers config.
        section: settings of the model; `quantization` is `none` or `nf4`.
        dtype: see `BaseValues`.

    Raises:
        CannotShard: transformers converts stored tensors while it loads, holds some of them in another dtype,
            or another quantization is set.
        UserError: the weight files are unreadable or incomplete.
    """
    if section.quantization not in ("none", "nf4"):
        raise CannotShard(f"model.quantization = {section.quantization} needs whole weights")
    attention, _ = choose_attention("auto", CPU, torch.float32, model_class(config))
    plain = section.model_copy(update={"quantization": "none"})
    model, _ = build_skeleton(path, _without_quantization(config), plain, torch.float32, attention, CPU)
    model.tie_weights()
    model.eval().requires_grad_(False)
    if dtype != torch.float32:
        held, _ = build_skeleton(path, _without_quantization(config), plain, dtype, attention, CPU)
        _refuse_other_dtypes(held, dtype)
    files = WeightFiles(path)
    if section.quantization == "none":
        sources = match_names(model, files)
        packed = {}
    else:
        quantised, _ = build_skeleton(path, config, section, torch.float32, attention, CPU)
        sources = match_names(quantised, files)
        packed = _packed_weights(quantised)
    base = BaseValues(model, _places(model), files, sources, packed, section.double_quant, dtype)
    for name, place in base.places.items():
        if place.tensor.device.type != "meta":  # a buffer, which the skeleton has with its first values
            place.tensor.copy_(base.whole(name))
    return base


def open_folder(path: Path, config, section: ModelSection) -> BaseValues:
    """Opens a folder of plain weights, whatever the run's quantization is."""
    return open_base(path, config, section.model_copy(update={"quantization": "none"}))


def _refuse_other_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises CannotShard for a skeleton in 16 bits of which transformers holds parts in float32."""
    kept = {name for name, t in model.state_dict().items() if t.is_floating_point() and t.dtype != dtype}
    kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if kept:
        raise CannotShard(
            f"transformers holds {min(kept)} of {type(model).__name__} in float32 and the rest in "
            f"{dtype_name(dtype)}"
        )


def _without_quantization(config):
    """The config of a model of ordinary layers."""
    if stored_four_bit(config) is None:
        return config
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def _packed_weights(model: nn.Module) -> dict[str, bool]:
    from transformers.pytorch_utils import Conv1D

    return {
        f"{name}.weight": issubclass(module.source_cls, Conv1D)
        for name, module in model.named_modules()
        if is_4bit(module)
    }


def _places(model: nn.Module) -> dict[str, Place]:
    found = {}
    for name, module in model.named_modules():
        own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                own[leaf] = buffer
        for leaf, tensor in own.items():
            found[f"{name}.{leaf}" if name else leaf] = Place(module, leaf, tensor)
    return found
