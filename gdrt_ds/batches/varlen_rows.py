"""flash-attn over packed rows: its variable-length call takes several samples in one row.

flash-attn knows no tree, so this serves `train.packing=packed`, where samples share nothing. A row of
lengths 3, 5 and 2 is given as cumulative lengths 0, 3, 8, 10 and the longest, 5; each sample is causal by
itself, and no padding is computed. The packages are imported at the first call, never before.

`varlen_reference` is the same call in plain torch, one sample after the other with all scores.

Shapes: T tokens of a row, S samples, A query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gdrt_ds.batches.tree_attention import TreeLayout, refuse_softcap
from gdrt_ds.errors import UserError
from gdrt_ds.runtime.devices import to_device

FLASH_2 = "gdrt_varlen_2"  # without "flash": transformers looks for that word
FLASH_3 = "gdrt_varlen_3"


def cumulative_lengths(layout: TreeLayout) -> tuple[Tensor, int]:
    """Returns int32[S + 1], where each sample begins and the last ends, and the longest sample's tokens.

    Raises:
        ValueError: the samples share tokens, which a list of lengths cannot say.
    """
    if any(chain.parent >= 0 for chain in layout.chains):
        raise ValueError("flash-attn's variable-length call cannot share a prompt prefix between samples")
    lengths = [chain.length for chain in layout.chains]
    stops = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
    return stops, max(lengths)


def varlen_rows(
    query: Tensor,  # [1, A, T, D]
    key: Tensor,  # [1, K, T, D]
    value: Tensor,  # [1, K, T, D]
    layout: TreeLayout,
    scale: float | None,
    dropout: float,
    window: int | None,
    call: Callable,
) -> Tensor:
    """Attention of one packed row as one variable-length call, [1, T, A, D].

    Args:
        layout: of the row; it keeps the cumulative lengths on the device for the other layers.
        scale: of the scores; None = 1 / sqrt(D).
        dropout: probability with which a weight is dropped.
        window: of this layer in positions; None = unlimited.
        call: flash_attn_varlen_func of either package, or `varlen_reference`.
    """
    if layout.varlen is None:
        stops, longest = cumulative_lengths(layout)
        object.__setattr__(layout, "varlen", (to_device(stops, query.device), longest))
    stops, longest = layout.varlen
    options = dict(softmax_scale=scale, causal=True)
    if window is not None:
        # Both ends count: a window of w positions is the token itself and the w - 1 before it.
        options["window_size"] = (window - 1, 0)
    if dropout:
        options["dropout_p"] = dropout
    # [1, heads, T, D] -> [T, heads, D]
    rows = [part[0].transpose(0, 1) for part in (query, key, value)]
    output = call(*rows, stops, stops, longest, longest, **options)
    if isinstance(output, tuple):  # some releases of flash_attn_interface add the log-sum-exp
        output = output[0]
    return output[None]


def varlen_reference(
    query: Tensor,  # [T, A, D]
    key: Tensor,  # [T, K, D]
    value: Tensor,  # [T, K, D]
    stops_q: Tensor,
    stops_k: Tensor,
    longest_q: int,
    longest_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """flash_attn_varlen_func in plain torch, [T, A, D], in the dtype of its inputs.

    Query i of a sample may see key j of it if -left <= j - i <= right; -1 is unlimited, and `causal` makes
    right 0.
    """
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    if causal:
        right = 0
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    starts = stops_q[:-1].tolist()
    assert torch.equal(stops_q, stops_k) and longest_q == longest_k == int(stops_q.diff().max())
    for start, stop in zip(starts, stops_q[1:].tolist(), strict=True):
        own_q, own_k, own_v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
        scores = own_q @ own_k.repeat_interleave(repeats, 0).transpose(1, 2) * scale
        distance = torch.arange(stop - start)[None, :] - torch.arange(stop - start)[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            hidden |= distance > right
        if left >= 0:
            hidden |= distance < -left
        weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1)
        outputs.append((weights @ own_v.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(outputs)


@functools.cache
def flash_call(package: str) -> Callable:
    """Returns flash_attn_varlen_func of `flash_attn` or `flash_attn_interface`.

    Raises:
        UserError: the package is not installed, or its kernels do not load.
    """
    try:
        return importlib.import_module(package).flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"attention: {package} cannot be imported ({error})",
            "reinstall flash-attn for this version of torch, or set model.attention=sdpa",
        ) from None


def flash_rows(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree_layout: TreeLayout | None = None,
    softcap: float | None = None,
    *,
    package: str,
    **kwargs,
):
    """The attention function that transformers calls; without a layout it is SDPA.

    Args:
        query: [B, A, T, D].
        key, value: [B, K, T, D].
        package: whose kernels are used.

    Returns:
        [B, T, A, D], and no attention weights.
    """
    if tree_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    refuse_softcap(softcap)
    call = flash_call(package)
    output = varlen_rows(query, key, value, tree_layout, scaling, dropout, sliding_window, call)
    return output.contiguous(), None


for _name, _package in ((FLASH_2, "flash_attn"), (FLASH_3, "flash_attn_interface")):
    AttentionInterface.register(_name, functools.partial(flash_rows, package=_package))
    AttentionMaskInterface.register(_name, sdpa_mask)
