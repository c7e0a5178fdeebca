"""Packed rows on the device: FlexAttention and flash-attn against SDPA and the whole matrix in float64."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

from gdrt_ds.batches import flex_rows as flex
from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.batches.tree_attention import TreeLayout, _segments, tree_mask
from gdrt_ds.batches.varlen_rows import flash_call, varlen_reference, varlen_rows
from tests.gpu.rows import Row, Spot, at_most, same, seconds_of

LENGTHS, HEAD = [900, 300, 17, 800, 40], 90
TOY_LENGTHS, TOY_HEAD = [60, 20, 7], 9
SCALE = 0.11
TIMES_PLAIN = 1.5
"""How much further from float64 than plain torch in the same dtype: both are roundings of one size."""
ALLOWANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}


class Counted:
    """A backend of torch.compile that runs graphs as they are and counts them (--dry)."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def run(spot: Spot) -> list[Row]:
    rows = []
    for name, layout in layouts(spot).items():
        for window in (None, 25 if spot.dry else 256):
            for way, call in ways(spot, layout).items():
                rows += compare(spot, f"{way}, {name}, window {window}", call, layout, window)
    return rows + [graphs(spot)] + ([] if spot.dry else times(spot))


def layouts(spot: Spot) -> dict[str, TreeLayout]:
    """Samples that share nothing, one prefix, or the prefixes that they happen to have in common."""
    lengths, head = (TOY_LENGTHS, TOY_HEAD) if spot.dry else (LENGTHS, HEAD)
    longest = np.random.default_rng(0).integers(0, 1000, max(lengths))
    rows = [np.concatenate([longest[: length // 2], np.arange(length) + 1000]) for length in lengths]
    return {
        "packed": TreeLayout.build(lengths, 0, spot.device),
        "shared prefix": TreeLayout.build(lengths, head, spot.device),
        "prefix tree": TreeLayout.of_tree(merge_prefixes(rows), spot.device),
    }


def ways(spot: Spot, layout: TreeLayout) -> dict:
    """Each takes (query, key, value, layout, window) and gives [1, A, T, D]."""

    def per_sample(query, key, value, layout, window):
        return _segments(query, key, value, layout, SCALE, 0.0, window)

    def compiled(query, key, value, layout, window):
        call = None
        if spot.dry:
            from torch.nn.attention.flex_attention import flex_attention as call
        return flex.flex_rows(query, key, value, layout, SCALE, window, call)

    found = {"SDPA per sample": per_sample, "FlexAttention": compiled}
    for package in ("flash_attn", "flash_attn_interface"):
        shares = any(chain.parent >= 0 for chain in layout.chains)
        if shares or (not spot.dry and importlib.util.find_spec(package) is None):
            continue

        def varlen(query, key, value, layout, window, package=package):
            call = varlen_reference if spot.dry else flash_call(package)
            return varlen_rows(query, key, value, layout, SCALE, 0.0, window, call).transpose(1, 2)

        name = f"a reference in place of {package}" if spot.dry else package
        found[name] = varlen
    return found


def make_row(spot: Spot, layout: TreeLayout) -> list[torch.Tensor]:
    """Query [1, A, T, D], key and value [1, K, T, D], leaves."""
    heads, keys, size = (4, 2, 16) if spot.dry else (32, 8, 128)
    dtype = torch.float32 if spot.dry else torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    total = len(layout.end)
    parts = [torch.randn(1, n, total, size, generator=generator) for n in (heads, keys, keys)]
    return [part.to(spot.device, dtype).requires_grad_() for part in parts]


def whole_matrix(query, key, value, layout, window):
    """Every score, in the dtype of the inputs."""
    repeats = query.shape[1] // key.shape[1]
    mask = tree_mask(layout.end, positions=layout.positions, window=window)
    scores = (query @ key.repeat_interleave(repeats, 1).transpose(2, 3)) * SCALE
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights @ value.repeat_interleave(repeats, 1)


def results(call, parts, layout, window, gradients: bool) -> list[torch.Tensor]:
    """The output, and the gradients of the three inputs."""
    if not gradients:
        with torch.no_grad():
            return [call(*parts, layout, window)]
    output = call(*parts, layout, window)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), parts)]


def compare(spot: Spot, what: str, call, layout: TreeLayout, window) -> list[Row]:
    gradients = not (spot.dry and what.startswith("FlexAttention"))  # on CPUs it has no backward
    parts = make_row(spot, layout)
    exact = [part.detach().double().requires_grad_() for part in parts]
    truths = results(whole_matrix, exact, layout, window, gradients)
    plains = results(whole_matrix, parts, layout, window, gradients)
    worst = 0.0
    for value, plain, truth in zip(
        results(call, parts, layout, window, gradients), plains, truths, strict=True
    ):
        norm = truth.norm()
        error = float((value.double() - truth).norm() / norm)
        usual = float((plain.double() - truth).norm() / norm)
        worst = max(worst, error / (TIMES_PLAIN * usual + ALLOWANCE[parts[0].dtype]))
    return [at_most(f"{what}: error against float64, times what plain torch may have", worst, 1.0)]


def graphs(spot: Spot) -> Row:
    """A stream of rows of many lengths: one graph per padded length, forward and backward."""
    rng = np.random.default_rng(0)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    backend = Counted()
    call = flex.compiled_flex(backend) if spot.dry else None
    sizes = set()
    for _ in range(8 if spot.dry else 40):
        most = int(rng.integers(50, 700 if spot.dry else 1500))
        layout = TreeLayout.build([most // 2 + 1, most // 3 + 1, most // 6 + 1], 20, spot.device)
        sizes.add(flex.padded_length(len(layout.end)))
        parts = make_row(spot, layout)
        with torch.set_grad_enabled(not spot.dry):
            output = flex.flex_rows(*parts, layout, SCALE, None, call)
        if not spot.dry:
            output.sum().backward()
    found = backend.graphs if spot.dry else counters["stats"]["unique_graphs"]
    return same(f"FlexAttention: graphs for a stream of {len(sizes)} padded lengths", found, len(sizes))


def times(spot: Spot) -> list[Row]:
    """Milliseconds of forward and backward of one row."""
    found = []
    for name, layout in layouts(spot).items():
        parts = make_row(spot, layout)
        for way, call in ways(spot, layout).items():

            def once(call=call, parts=parts, layout=layout):
                results(call, parts, layout, None, True)

            once()
            milliseconds = 1e3 * seconds_of(once, spot.device, 10)
            found.append(Row(f"{way}, {name}: forward and backward", f"{milliseconds:.2f} ms"))
    return found
