"""Dropout whose masks are a function of seed, step and prefix, and of nothing else.

The masks of `nn.Dropout` come from a stream of random numbers. So they change with the packing, the
micro-batch and the number of ranks, and a tree's samples have other masks than the same samples padded. Here
each token has a key that stands for the seed, the step and the tokens up to it (batches/token_keys.py). A
value is dropped if a hash of the key, the layer and the column says so. Then samples share the mask of a
token wherever they share its prefix, and the same global batch gives the same gradients however it is
computed.

It costs no random numbers. The hash is `lowbias32` (Ellis, "Prospecting for hash functions", 2018); each call
of it gives the mask of two values, 16 bits each.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

STEPS_OF_16_BITS = 1 << 16
MOST_FORWARDS = 4
"""Forwards whose backward may still come: counterfactual training has two, everything else one."""
LAYER_CONSTANT = 0x9E3779B97F4A7C15
MULTIPLIER = 0x2545F4914F6CDD1D
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


class ForwardKeys:
    """The keys of the tokens that a forward computes, found again when a layer is computed a second time.

    Activation checkpointing repeats a layer during the backward, when another forward may have begun. It puts
    the state of the random numbers back, and with it their seed. So the seed names the forward.
    """

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._columns: dict[tuple[int, torch.device], Tensor] = {}
        self._told: set[str] = set()

    def begin(self, keys: Tensor) -> None:
        """Says that a forward of tokens with these keys [B, T] begins, under the seed that torch has now."""
        seed = torch.initial_seed()
        self._keys.pop(seed, None)
        self._keys[seed] = keys
        self._columns.clear()
        while len(self._keys) > MOST_FORWARDS:
            self._keys.pop(next(iter(self._keys)))

    def begin_beside(self, keys: Tensor) -> None:
        """The same for a second forward of one micro-batch."""
        torch.manual_seed((torch.initial_seed() + 1) % (1 << 63))
        self.begin(keys)

    def current(self) -> Tensor | None:
        """Returns the keys of the forward that is computed now; None where nobody said that one begins."""
        return self._keys.get(torch.initial_seed())

    def columns(self, width: int, device: torch.device) -> Tensor:
        """Returns int32[ceil(width / 2)]: a hash for every pair of columns."""
        place = (width, device)
        if place not in self._columns:
            count = torch.arange(1, (width + 1) // 2 + 1, dtype=torch.int32, device=device)
            self._columns[place] = _lowbias32(count)
        return self._columns[place]

    def tell_once(self, name: str, rows: int, tokens: int) -> None:
        if name not in self._told:
            self._told.add(name)
            warnings.warn(
                f"dropout {name}: its input has {rows} rows and the micro-batch {tokens} tokens, so its "
                "masks depend on the micro-batch and the rank",
                stacklevel=3,
            )


class PrefixDropout(nn.Dropout):
    """`nn.Dropout` with masks by key; without keys it is `nn.Dropout`.

    Attributes:
        forwards: where the keys of the current forward are.
        number: of this layer among those of the model, so that layers have masks of their own.
        name: for messages.
    """

    forwards: ForwardKeys
    number: int
    name: str

    def forward(self, input: Tensor) -> Tensor:
        keys = self.forwards.current() if self.training and self.p > 0 else None
        if keys is None:
            return super().forward(input)
        rows = input.shape[:-1].numel()
        if rows != keys.numel():
            self.forwards.tell_once(self.name, rows, keys.numel())
            return super().forward(input)
        columns = self.forwards.columns(input.shape[-1], input.device)
        dropped, kept_share = dropped_values(keys.view(input.shape[:-1]), columns, self.number, self.p)
        return input.masked_fill(dropped[..., : input.shape[-1]], 0.0) * (1.0 / kept_share)


def dropped_values(keys: Tensor, columns: Tensor, number: int, p: float) -> tuple[Tensor, float]:
    """Returns the mask bool[..., 2 C], True where a value is dropped, and the share that is kept on average.

    Args:
        keys: int64[...], one for each token.
        columns: int32[C], what `ForwardKeys.columns` returns.
        number: of the layer.
        p: share of the values to drop; it is rounded to 1/65,536.
    """
    steps = round(p * STEPS_OF_16_BITS)
    mixed = (keys ^ _signed(LAYER_CONSTANT * (number + 1), 64)) * MULTIPLIER
    own = (mixed >> 32).to(torch.int32)
    bits = _lowbias32(own[..., None] ^ columns).view(torch.int16)
    return bits < steps - STEPS_OF_16_BITS // 2, 1.0 - steps / STEPS_OF_16_BITS


def use_prefix_dropout(model: nn.Module) -> ForwardKeys:
    """Turns the model's dropout layers into `PrefixDropout`, in place; returns where forwards begin.

    The class changes and nothing else. Dropout inside attention has no layer of its own and stays as it is.
    """
    forwards = ForwardKeys()
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Dropout]
    for number, (name, module) in enumerate(layers):
        module.__class__ = PrefixDropout
        module.forwards, module.number, module.name = forwards, number, name
    return forwards


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
