"""The logits of a model that is larger than memory: each part is filled, computes and is emptied again.

Weights are read from files while the forward runs, once each. An nn.Linear multiplies by some rows at a time,
an embedding gets the rows of its tokens, and any other module is filled, in float32, before its forward and
emptied afterwards. It is meant for one short row of tokens: the check of an export.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gdrt_ds.models.base_values import Place, blocks_of, gather
from gdrt_ds.models.families import decoder_layers
from gdrt_ds.models.token_rows import TokenRows

AT_ONCE = 1 << 20
"""Values of a weight that an nn.Linear multiplies by at once."""

Pieces = Callable[[str], Iterator[Tensor]]
"""Name of a tensor -> its values in order, flat, in float32."""


class CannotStream(Exception):
    """Why a model's forward is not computed layer by layer; the text is announced."""


class NotFilled(RuntimeError):
    """A module computed with the weight of another one, which is empty at that time."""


class EmptyWeight(torch.Tensor):
    """Stands where a weight is not filled: its shape can be asked for, computing with it is an error.

    Computing with a plain tensor on the meta device is no error everywhere: some operations of CPUs take it
    and give anything.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("__get__", "size", "dim", "numel", "is_floating_point"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotFilled(getattr(function, "__name__", str(function)))


def logits_layer_by_layer(
    places: dict[str, Place], pieces: Pieces, model: nn.Module, input_ids: Tensor
) -> Tensor:
    """Returns [1, T, V] logits in float32.

    Args:
        places: where the tensors of the model stand (`BaseValues.places`).
        pieces: reads their values.
        model: a skeleton, or PEFT's model around it.
        input_ids: Long[1, T].

    Raises:
        CannotStream: some module reads the weights of another one, even where whole decoder layers are
            filled at once.
    """
    reason = ""
    for whole_layers in (False, True):
        try:
            with _filled_on_demand(places, pieces, model, whole_layers), torch.no_grad():
                return model(input_ids=input_ids, use_cache=False).logits
        except NotFilled as error:
            reason = str(error)
    raise CannotStream(f"its modules read each other's weights ({reason})")


@contextmanager
def _filled_on_demand(
    places: dict[str, Place], pieces: Pieces, model: nn.Module, whole_layers: bool
) -> Iterator[None]:
    """While the block runs, weights are empty except in the module that computes."""
    empty = {name: place for name, place in places.items() if place.tensor.device.type == "meta"}
    outer = _outer_modules(model, whole_layers)
    filled: dict[int, tuple[nn.Module, dict[str, Place]]] = {}
    with ExitStack() as stack:
        stack.callback(_restore, empty)
        _empty(empty)
        for name, place in empty.items():
            unit = outer.get(id(place.module), place.module)
            if place.leaf == "weight" and _by_rows(place.module, unit):
                stack.enter_context(_forward_by_rows(place, name, pieces))
            else:
                filled.setdefault(id(unit), (unit, {}))[1][name] = place
        for unit, here in filled.values():
            stack.callback(unit.register_forward_pre_hook(_filling(here, pieces)).remove)
            stack.callback(unit.register_forward_hook(_emptying(here), always_call=True).remove)
        yield


def _outer_modules(model: nn.Module, whole_layers: bool) -> dict[int, nn.Module]:
    """id of a module -> the module with which it is filled.

    An adapter's layer is filled with the layer inside it, whose weight some adapters read.
    """
    units = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if whole_layers:
        units = [*decoder_layers(model), *units]
    return {id(inner): unit for unit in reversed(units) for inner in unit.modules()}


def _by_rows(module: nn.Module, unit: nn.Module) -> bool:
    """Whether a module computes with some rows at a time, alone or inside an adapter that only calls it."""
    if unit is module:
        return type(module) is nn.Linear or isinstance(module, nn.Embedding)
    if isinstance(unit, TokenRows):
        return isinstance(module, nn.Embedding)
    return isinstance(unit, LoraLayer) and type(module) is nn.Linear and not any(unit.lora_variant.values())


@contextmanager
def _forward_by_rows(place: Place, name: str, pieces: Pieces) -> Iterator[None]:
    """While the block runs, an nn.Linear or an embedding reads its weight in its forward."""
    module = place.module
    rows, columns = place.tensor.shape
    height = max(1, AT_ONCE // columns)
    own = module.forward

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for number, block in enumerate(blocks_of(pieces(name), height * columns)):
            yield number * height, block.view(-1, columns)

    def product(x: Tensor) -> Tensor:
        found = x.new_empty(*x.shape[:-1], rows)
        for start, block in blocks():
            found[..., start : start + len(block)] = nn.functional.linear(x, block)
        return found if module.bias is None else found + module.bias

    def look_up(ids: Tensor, *args, **kwargs) -> Tensor:
        # Rows that no token asks for are never written, so that the system gives them no memory.
        weight = torch.empty(rows, columns)
        wanted = ids.unique()
        for start, block in blocks():
            here = wanted[(wanted >= start) & (wanted < start + len(block))]
            weight[here] = block[here - start]
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            return own(ids, *args, **kwargs)
        finally:
            _empty({name: place})

    module.forward = product if type(module) is nn.Linear else look_up
    try:
        yield
    finally:
        del module.forward


def _restore(places: dict[str, Place]) -> None:
    for place in places.values():
        place.module._parameters[place.leaf] = place.tensor


def _empty(places: dict[str, Place]) -> None:
    for place in places.values():
        place.module._parameters[place.leaf] = torch.Tensor._make_subclass(EmptyWeight, place.tensor)


def _filling(places: dict[str, Place], pieces: Pieces):
    def hook(module, inputs) -> None:
        for name, place in places.items():
            values = gather(pieces(name), place.tensor.shape)
            place.module._parameters[place.leaf] = nn.Parameter(values, requires_grad=False)

    return hook


def _emptying(places: dict[str, Place]):
    def hook(module, inputs, output) -> None:
        _empty(places)

    return hook
