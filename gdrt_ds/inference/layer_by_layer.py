"""The logits of a model that is larger than memory: each part is filled, computes and is emptied again.

A base is read from its files while the forward runs. Hooks fill a module before its forward and empty it
afterwards, so that one module's weights are in memory at a time, in float32. It reads every weight once and
is meant for one short row of tokens: the check of an export.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gdrt_ds.models.base_values import Place
from gdrt_ds.models.families import decoder_layers


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
    places: dict[str, Place], whole: Callable[[str], Tensor], model: nn.Module, input_ids: Tensor
) -> Tensor:
    """Returns [1, T, V] logits in float32.

    Args:
        places: where the tensors of the model stand (`BaseValues.places`).
        whole: name of a tensor -> its values.
        model: a skeleton, or PEFT's model around it.
        input_ids: Long[1, T].

    Raises:
        CannotStream: some module reads the weights of another one, even where whole decoder layers are
            filled at once.
    """
    reason = ""
    for whole_layers in (False, True):
        try:
            with _filled_on_demand(places, whole, model, whole_layers), torch.no_grad():
                return model(input_ids=input_ids, use_cache=False).logits
        except NotFilled as error:
            reason = str(error)
    raise CannotStream(f"its modules read each other's weights ({reason})")


@contextmanager
def _filled_on_demand(
    places: dict[str, Place], whole: Callable[[str], Tensor], model: nn.Module, whole_layers: bool
) -> Iterator[None]:
    handles = []
    units = [
        (unit, {name: places[name] for name in names}) for unit, names in _units(places, model, whole_layers)
    ]
    try:
        for unit, here in units:
            _empty(here)
            handles.append(unit.register_forward_pre_hook(_filling(here, whole)))
            handles.append(unit.register_forward_hook(_emptying(here), always_call=True))
        yield
    finally:
        for _, here in units:
            for place in here.values():
                place.module._parameters[place.leaf] = place.tensor
        for handle in handles:
            handle.remove()


def _units(
    places: dict[str, Place], model: nn.Module, whole_layers: bool
) -> list[tuple[nn.Module, list[str]]]:
    """Modules that are filled at once, and the names of what they hold.

    An adapter's layer is filled with the layer inside it, whose weight some adapters read.
    """
    outer = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if whole_layers:
        outer = [*decoder_layers(model), *outer]
    unit_of = {}
    for unit in reversed(outer):
        for inner in unit.modules():
            unit_of[id(inner)] = unit
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, place in places.items():
        if place.tensor.device.type != "meta":
            continue
        unit = unit_of.get(id(place.module), place.module)
        found.setdefault(id(unit), (unit, []))[1].append(name)
    return list(found.values())


def _empty(places: dict[str, Place]) -> None:
    for place in places.values():
        place.module._parameters[place.leaf] = torch.Tensor._make_subclass(EmptyWeight, place.tensor)


def _filling(places: dict[str, Place], whole: Callable[[str], Tensor]):
    def hook(module, inputs) -> None:
        for name, place in places.items():
            place.module._parameters[place.leaf] = nn.Parameter(whole(name), requires_grad=False)

    return hook


def _emptying(places: dict[str, Place]):
    def hook(module, inputs, output) -> None:
        _empty(places)

    return hook
