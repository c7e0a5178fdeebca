"""The weights of a merged model, one tensor at a time: base and adapter are never in memory together.

PEFT's own layers merge: the adapter is put around a skeleton without storage, one layer gets its base weight,
merges, gives its weight away and is empty again. So every kind of adapter that PEFT merges is merged as PEFT
does it. What has no adapter passes through in small pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from gdrt_ds.config import ModelSection
from gdrt_ds.inference.export_checks import (
    Probe,
    Written,
    check_difference,
    check_loaded,
    check_merged,
    probe_ids,
)
from gdrt_ds.inference.layer_by_layer import logits_layer_by_layer
from gdrt_ds.inference.recommender import check_adapter
from gdrt_ds.models.adapters import load_adapter
from gdrt_ds.models.base_values import BaseValues, blocks_of, open_base, open_folder
from gdrt_ds.models.sharded_loading import CannotShard
from gdrt_ds.models.source import load_tokenizer, read_model_config, tokenizer_source
from gdrt_ds.models.weight_writer import TensorShape, write_weights
from gdrt_ds.runtime.large_blocks import map_large_blocks

MERGED_AT_ONCE = 1 << 21
"""Values of a weight that are merged at once where rows are; PEFT works on three float32 copies of them."""


def write_by_tensor(
    section: ModelSection,
    base: Path,
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    shard_size: str,
    loaded: bool = False,
    held_in: torch.dtype = torch.float32,
) -> Written:
    """Writes weights and tokenizer of the merged model, and checks them.

    The merged weights must give the logits of base + adapter in float32, and once more as they were written.
    Both are computed layer by layer, in a forward of plain layers.

    Args:
        section: settings of the model, in float32.
        base, adapter: their folders.
        folder: where the model is written.
        dtype: of the stored weights.
        shard_size: largest size of one weight file.
        loaded: load the written folder with transformers besides, whole, and compare its logits too.
        held_in: the dtype in which the base is held, and quantised, before it is merged in float32.

    Raises:
        CannotShard, CannotStream: this model or adapter is not merged so.
        UserError: an adapter that does not fit, or merged logits that differ from those of base + adapter.
    """
    map_large_blocks()
    config = read_model_config(base, trust_remote_code=section.trust_remote_code)
    values = open_base(base, config, section, held_in)
    with hollow_weights(values):
        model, _ = load_adapter(values.model, adapter, base, torch.float32, train=False)
    check_adapter(model, adapter)
    model.eval()
    tokenizer = load_tokenizer(tokenizer_source(section, base), trust_remote_code=section.trust_remote_code)
    input_ids = probe_ids(tokenizer)
    probe = Probe(input_ids, logits_layer_by_layer(values.places, values.pieces, model, input_ids))
    merged = MergedValues(values, model)
    merged.write(folder, dtype, shard_size)
    tokenizer.save_pretrained(folder)
    written_config = read_model_config(folder, trust_remote_code=section.trust_remote_code)
    written = open_folder(folder, written_config, section)
    logits = logits_layer_by_layer(written.places, merged.values, written.model, input_ids)
    check_merged(probe.difference_of(logits), probe)
    logits = logits_layer_by_layer(written.places, written.pieces, written.model, input_ids)
    difference = probe.difference_of(logits)
    check_difference(difference, probe, dtype)
    if not loaded:
        return Written(difference, probe.largest, "computed layer by layer")
    difference = max(difference, check_loaded(folder, probe, dtype, section.trust_remote_code))
    return Written(difference, probe.largest, "computed layer by layer, and loaded by transformers")


class MergedValues:
    """Base and adapter as the tensors of one plain model.

    Args:
        base: the base on disk.
        peft_model: the adapter around `base.model`, with real weights.

    Attributes:
        model: the skeleton of the plain model; its config is that of the merged one.

    Raises:
        CannotShard: the adapter has a part that is not merged layer by layer.
    """

    def __init__(self, base: BaseValues, peft_model: nn.Module):
        self.base = base
        self.model = base.model
        self._layers = adapted_layers(peft_model)
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        # A head that has an adapter and is tied to the embedding gets a weight of its own: the merge would
        # change the embedding too.
        if any(isinstance(self._layer_of(name), LoraLayer) for name in ties):
            self.model.config.tie_word_embeddings = False
            ties = {}
        self.model.all_tied_weights_keys = ties

    def _layer_of(self, name: str) -> BaseTunerLayer | None:
        """The adapter's layer around the module that holds a tensor."""
        return self._layers.get(id(self.base.places[name].module))

    def tensors(self, dtype: torch.dtype) -> dict[str, TensorShape]:
        """What is written, in the order of the model's state: floats in `dtype`."""
        left_out = set(self.model.all_tied_weights_keys)
        left_out |= set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        found = {}
        for name, place in self.base.places.items():
            if name not in left_out:
                stored_as = dtype if place.tensor.is_floating_point() else place.tensor.dtype
                found[name] = TensorShape(tuple(place.tensor.shape), stored_as)
        return found

    def num_parameters(self) -> int:
        """Parameters of the plain model, tied ones counted once."""
        places = [self.base.places[name] for name in self.tensors(torch.float32)]
        return sum(place.tensor.numel() for place in places if isinstance(place.tensor, nn.Parameter))

    def values(self, name: str) -> Iterator[Tensor]:
        """Yields the merged values of a tensor in order, flat; floats in float32."""
        place = self.base.places[name]
        layer = self._layer_of(name)
        if layer is None or place.leaf != "weight":
            yield from self.base.pieces(name)
        elif merges_by_rows(layer):
            columns = place.tensor.shape[1]
            yield from merged_rows(layer, self.base.pieces(name), columns)
        else:
            yield merged_weight(layer, self.base.whole(name)).reshape(-1)

    def stored(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same as they are written: floats in `dtype`."""
        for piece in self.values(name):
            yield piece.to(dtype) if piece.is_floating_point() else piece

    def write(self, folder: Path, dtype: torch.dtype, shard_size: str) -> list[str]:
        """Writes weights, config and generation config as transformers' save_pretrained does.

        Returns:
            the names of the weight files.
        """
        model = self.model
        folder.mkdir(parents=True, exist_ok=True)
        model.config.use_cache = True
        model.config.dtype = str(dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        if model.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        if model.can_generate():
            _read_generation_config(model, self.base.files.folder)
            model.generation_config.save_pretrained(folder)
        return write_weights(
            folder,
            self.tensors(dtype),
            lambda name: self.stored(name, dtype),
            shard_size,
            self.num_parameters(),
        )


def _read_generation_config(model: nn.Module, base: Path) -> None:
    """Gives a skeleton the generation config of its folder, as transformers' from_pretrained does."""
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:  # no such file: it is made from the model's config
        model.generation_config = GenerationConfig.from_pretrained(
            base, config_file_name="config.json", _from_model_config=True
        )


@contextmanager
def hollow_weights(base: BaseValues) -> Iterator[None]:
    """Lets PEFT build an adapter around a skeleton: it moves the adapter to the device of the base's weights.

    Meanwhile these are tensors on the CPU over a single zero. Afterwards they are on the meta device again,
    where nothing computes with them by mistake.
    """
    hollow: dict[int, nn.Parameter] = {}  # tied weights stay one object
    empty = [place for place in base.places.values() if place.tensor.device.type == "meta"]
    for place in empty:
        if id(place.tensor) not in hollow:
            zeros = torch.zeros((), dtype=place.tensor.dtype).expand(place.tensor.shape)
            hollow[id(place.tensor)] = nn.Parameter(zeros, requires_grad=False)
        place.module._parameters[place.leaf] = hollow[id(place.tensor)]
    try:
        yield
    finally:
        for place in empty:
            place.module._parameters[place.leaf] = place.tensor


def adapted_layers(peft_model: nn.Module) -> dict[int, BaseTunerLayer]:
    """Returns id of a plain layer -> the adapter's layer around it.

    Raises:
        CannotShard: see `MergedValues`.
    """
    settings = peft_model.peft_config["default"]
    if getattr(settings, "bias", "none") != "none" or getattr(settings, "lora_bias", False):
        raise CannotShard("the adapter trains biases")
    if not isinstance(getattr(settings, "init_lora_weights", True), bool):
        raise CannotShard(f"the adapter changes the base (init_lora_weights={settings.init_lora_weights})")
    found: dict[int, BaseTunerLayer] = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            raise CannotShard(f"the adapter replaces {name} as a whole (modules_to_save)")
        if not isinstance(module, BaseTunerLayer):
            continue
        inner = module.base_layer
        if not isinstance(module, (LoraLayer, TrainableTokensLayer)) or "weight" not in inner._parameters:
            raise CannotShard(f"{name} is a {type(module).__name__} around a {type(inner).__name__}")
        if id(inner) in found:
            raise CannotShard(f"{name} has two adapters")
        found[id(inner)] = module
    return found


def merges_by_rows(layer: BaseTunerLayer) -> bool:
    """Whether rows of the weight are merged without the others: a plain LoRA on an nn.Linear.

    DoRA reads whole rows of base and adapter too, but keeps more beside them; PEFT merges those at once.
    """
    plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear
    return plain and not layer.fan_in_fan_out and not any(layer.lora_variant.values())


def merged_rows(layer: Linear, pieces: Iterator[Tensor], columns: int) -> Iterator[Tensor]:
    """Yields a weight with its adapter, flat, some rows at a time: PEFT's layer merges each block.

    Args:
        layer: PEFT's layer around a layer without storage.
        pieces: the base's values in order, float32.
        columns: of the weight.
    """
    name = layer.active_adapters[0]
    whole = layer.lora_B[name].weight
    rows = max(1, MERGED_AT_ONCE // columns)
    start = 0
    for block in blocks_of(pieces, rows * columns):
        block = block.view(-1, columns)
        part = whole.detach()[start : start + len(block)]
        start += len(block)
        layer.lora_B[name].weight = nn.Parameter(part, requires_grad=False)
        try:
            yield merged_weight(layer, block).view(-1)
        finally:
            layer.lora_B[name].weight = whole


def merged_weight(layer: BaseTunerLayer, weight: Tensor) -> Tensor:
    """Returns a layer's weight with its adapter; afterwards the layer is as empty as before.

    Args:
        layer: PEFT's layer around a layer without storage.
        weight: the base's values, float32; they may be changed in place.
    """
    inner = layer.base_layer
    empty = inner.weight
    inner.weight = nn.Parameter(weight, requires_grad=False)
    try:
        with torch.no_grad():
            layer.merge()
        return inner.weight.data
    finally:
        inner.weight = empty
        layer.merged_adapters.clear()
