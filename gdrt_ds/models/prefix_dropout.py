"""Dropout whose masks are a function of seed, step and prefix, and of nothing else.

The masks of `nn.Dropout` come from a stream of random numbers. So they change with the packing, the
micro-batch and the number of ranks, and a tree's samples have other masks than the same samples padded. Here
each token has a key that stands for the seed, the step and the tokens up to it (batches/token_keys.py). A
value is dropped if a hash of the key, the layer's name and the column says so. Then samples share the mask
of a token wherever they share its prefix, and the same global batch gives the same gradients however it is
computed.

It costs no random numbers. The hash is `lowbias32` (Ellis, "Prospecting for hash functions", 2018); each call
of it gives the mask of two values, 16 bits each.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

STEPS_OF_16_BITS = 1 << 16
MOST_FORWARDS = 4
"""Forwards whose backward may still come: counterfactual training has two, everything else one."""
CALL_CONSTANT = 0x9E3779B97F4A7C15
MULTIPLIER = 0x2545F4914F6CDD1D
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


class ForwardKeys:
    """The keys of the tokens that a forward computes, found again when a layer is computed a second time.

    Activation checkpointing repeats a layer during the backward, when another forward may have begun. It puts
    the state of the random numbers back, and with it their seed. So the seed names the forward.
    """

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._ended: deque[int] = deque(maxlen=64)
        self._columns: dict[tuple[int, torch.device], Tensor] = {}
        self._told: set[str] = set()

    def begin(self, keys: Tensor) -> None:
        """Says that a forward of tokens with these keys [B, T] begins, under the seed that torch has now."""
        seed = torch.initial_seed()
        self._keys.pop(seed, None)
        self._keys[seed] = keys
        self._columns.clear()
        while len(self._keys) > MOST_FORWARDS:
            oldest = next(iter(self._keys))
            self._keys.pop(oldest)
            self._ended.append(oldest)

    def begin_beside(self, keys: Tensor) -> None:
        """The same for a second forward of one micro-batch."""
        torch.manual_seed((torch.initial_seed() + 1) % (1 << 63))
        self.begin(keys)

    def current(self) -> Tensor | None:
        """Returns the keys of the forward that is computed now; None where nobody said that one begins.

        Raises:
            RuntimeError: a layer of a forward that is long over is computed again: its gradients would be
                wrong.
        """
        seed = torch.initial_seed()
        keys = self._keys.get(seed)
        if keys is None and seed in self._ended:
            raise RuntimeError(
                f"a layer is computed again of a forward that began more than {MOST_FORWARDS} forwards ago, "
                "and its dropout masks are gone: run the backward of each forward before further ones begin"
            )
        return keys

    def columns(self, width: int, device: torch.device) -> Tensor:
        """Returns int32[ceil(width / 2)]: a hash for every pair of columns."""
        place = (width, device)
        if place not in self._columns:
            count = torch.arange(1, (width + 1) // 2 + 1, dtype=torch.int32, device=device)
            self._columns[place] = _lowbias32(count)
        return self._columns[place]

    def tell_once(self, name: str, found: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"dropout {name}: the rows of its input {list(found)} are not the tokens {list(tokens)} of "
                "the micro-batch, so its masks depend on the packing, the micro-batch and the rank",
                stacklevel=3,
            )


class PrefixDropout(nn.Dropout):
    """`nn.Dropout` with masks by key; without keys it is `nn.Dropout`.

    Attributes:
        forwards: where the keys of the current forward are.
        name: of this layer in the model, so that layers have masks of their own.
        number: a hash of the name.
        calls: calls since the module that holds it began: a layer that is used twice has two masks.
    """

    forwards: ForwardKeys
    name: str
    number: int
    calls: int

    def forward(self, input: Tensor) -> Tensor:
        keys = self.forwards.current() if self.training and self.p > 0 else None
        steps = round(self.p * STEPS_OF_16_BITS)
        if keys is None or steps == STEPS_OF_16_BITS:
            return super().forward(input)
        if not _are_tokens(input, keys):
            self.forwards.tell_once(self.name, tuple(input.shape), tuple(keys.shape))
            return super().forward(input)
        columns = self.forwards.columns(input.shape[-1], input.device)
        number = self.number + CALL_CONSTANT * self.calls
        self.calls += 1
        dropped = dropped_values(keys.view(input.shape[:-1]), columns, number, steps)
        return input.masked_fill(dropped[..., : input.shape[-1]], 0.0) / (1.0 - steps / STEPS_OF_16_BITS)


def _are_tokens(input: Tensor, keys: Tensor) -> bool:
    """Whether the rows of the input are the tokens of the forward, in their order: [B, T, C] or [B*T, C]."""
    if input.dim() == 2:
        return input.shape[0] == keys.numel()
    return input.shape[:-1] == keys.shape


def dropped_values(keys: Tensor, columns: Tensor, number: int, steps: int) -> Tensor:
    """Returns the mask bool[..., 2 C], True where a value is dropped.

    Two tokens have one mask in a layer where 32 bits agree by chance.

    Args:
        keys: int64[...], one for each token.
        columns: int32[C], what `ForwardKeys.columns` returns.
        number: of the layer and the call.
        steps: share of the values to drop, in 1/65,536.
    """
    mixed = (keys ^ _signed(number, 64)) * MULTIPLIER
    own = (mixed >> 32).to(torch.int32)
    bits = _lowbias32(own[..., None] ^ columns).view(torch.int16)
    return bits < steps - STEPS_OF_16_BITS // 2


def use_prefix_dropout(model: nn.Module) -> ForwardKeys:
    """Turns the model's dropout layers into `PrefixDropout`, in place; returns where forwards begin.

    The class changes and nothing else. Dropout that is no layer stays as it is, see `other_dropout`.
    """
    forwards = ForwardKeys()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if type(module) is not nn.Dropout:
            continue
        module.__class__ = PrefixDropout
        module.forwards, module.name, module.calls = forwards, name, 0
        module.number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        _holder(modules, name).register_forward_pre_hook(_starts_counting(module))
    return forwards


def other_dropout(model: nn.Module) -> str:
    """Returns a line about dropout of the model that is no layer of its own; empty where there is none.

    Functions inside a module, attention above all, draw their masks from torch's random numbers.
    """
    covered = {module.p for module in model.modules() if isinstance(module, PrefixDropout)}
    settings = model.config.get_text_config().to_dict()
    found = [
        f"{name} = {value:g}"
        for name, value in settings.items()
        if ("drop" in name and isinstance(value, float) and 0 < value < 1)
        and ("attn" in name or "attention" in name or value not in covered)
    ]
    if not found:
        return ""
    return (
        f"dropout: the model has {', '.join(found)}; where that is no layer of its own, masks depend on the "
        "packing, the micro-batch and the rank"
    )


def _holder(modules: dict[str, nn.Module], name: str) -> nn.Module:
    """The nearest module above a layer that is called itself: containers of PEFT and torch are not."""
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(modules[name], (nn.ModuleDict, nn.ModuleList)):
            break
    return modules[name]


def _starts_counting(layer: PrefixDropout):
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        layer.calls = 0

    return hook


def _lowbias32(values: Tensor) -> Tensor:
    """int32 -> int32, each bit of the result depends on all bits; products wrap."""
    values = values ^ ((values >> 16) & 0xFFFF)
    values = values * _signed(FIRST, 32)
    values = values ^ ((values >> 15) & 0x1FFFF)
    values = values * _signed(SECOND, 32)
    return values ^ ((values >> 16) & 0xFFFF)


def _signed(value: int, bits: int) -> int:
    """The same bits as a signed number: torch has no unsigned products."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
