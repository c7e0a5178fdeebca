"""FlexAttention over packed rows: the blocks that are computed, the number of graphs, and the way round it.

Compiled here by a backend that runs a graph as it is, so that graphs can be counted without a GPU; the
compiled CPU kernel is tried once, in a slow test.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gdrt_ds.batches import flex_rows as module
from gdrt_ds.batches.flex_rows import (
    BLOCK,
    block_mask_bytes,
    compiled_flex,
    flex_rows,
    layout_block_mask,
    padded_length,
    visible_blocks,
)
from gdrt_ds.batches.prefix_tree import merge_prefixes
from gdrt_ds.batches.tree_attention import TreeLayout, _segments, tree_mask
from gdrt_ds.errors import UserError

CPU = torch.device("cpu")
SCALE = 0.3


class Counted:
    """A backend of torch.compile that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counted():
    torch._dynamo.reset()
    backend = Counted()
    yield backend
    torch._dynamo.reset()


def row(layout: TreeLayout, dtype=torch.float32, seed: int = 1):
    """Query [1, 4, T, 16], key and value [1, 2, T, 16]."""
    generator = torch.Generator().manual_seed(seed)
    total = len(layout.end)
    return [torch.randn(1, heads, total, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2)]


def reference(query, key, value, layout, window):
    """The whole matrix of scores in float64."""
    query, key, value = (part.double() for part in (query, key, value))
    mask = tree_mask(layout.end, positions=layout.positions, window=window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * SCALE
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)


def random_layout(rng, most: int, head: int) -> TreeLayout:
    lengths = []
    while sum(lengths) < most:
        lengths.append(int(rng.integers(1, 150)))
    return TreeLayout.build(lengths, head)


def random_tree(rng, most: int) -> TreeLayout:
    """Rows that begin like one another for a while."""
    rows = [rng.integers(0, 1000, 150)]
    while sum(map(len, rows)) < most:
        start = rows[int(rng.integers(len(rows)))]
        kept = int(rng.integers(len(start)))
        rows.append(np.concatenate([start[:kept], rng.integers(0, 1000, int(rng.integers(1, 150)))]))
    return TreeLayout.of_tree(merge_prefixes(rows))


def test_lengths_are_padded_to_few_sizes_and_by_half_at_most():
    sizes = sorted({padded_length(length) for length in range(1, 16385)})
    assert sizes == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384]
    assert all(size % BLOCK == 0 for size in sizes)
    for length in range(256, 16385):
        assert length <= padded_length(length) < 1.5 * length + 1


@pytest.mark.parametrize("head,window", [(0, None), (200, None), (0, 40), (200, 300)])
def test_the_blocks_of_a_layout_are_those_that_torch_finds_by_trying_every_score(head, window):
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, 900) for _ in range(3)]
    for layout in [*trees, *(random_layout(rng, 600, head) for _ in range(4))]:
        mask = layout_block_mask(layout, window, CPU)
        size = mask.seq_lengths[0]
        theirs = create_block_mask(mask.mask_mod, None, None, size, size, device="cpu")
        computed, wanted = mask.to_dense().bool(), theirs.to_dense().bool()
        assert (computed | ~wanted).all(), "a block that is needed is left out"
        if window is None:
            assert torch.equal(computed, wanted)
            assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)
        else:
            assert computed.sum() < torch.tril(torch.ones_like(computed)).sum() or head
        end, positions = _padded_rule(layout, size)
        dense = tree_mask(end, positions=positions, window=window)
        partial, full = visible_blocks(end, positions, window)
        blocks = dense.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK)
        assert blocks.all(3).all(1)[full].all(), "a block counts as full that is not"
        assert not (partial & full).any()


def _padded_rule(layout, size):
    end, positions = layout.host_rule()
    end = torch.cat([end, torch.arange(len(end), size) + 1])
    return end, torch.nn.functional.pad(positions, (0, size - len(positions)))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("head,window", [(0, None), (40, None), (0, 25), (40, 60)])
def test_padded_rows_give_the_attention_of_the_whole_matrix(head, window):
    rng = np.random.default_rng(3)
    layout = random_layout(rng, 300, head) if head else random_tree(rng, 300)
    parts = row(layout)
    wanted = reference(*parts, layout, window)
    assert torch.allclose(
        flex_rows(*parts, layout, SCALE, window, flex_attention).double(), wanted, atol=1e-5
    )
    assert torch.allclose(_segments(*parts, layout, SCALE, 0.0, window).double(), wanted, atol=1e-5)


@pytest.mark.slow
def test_rows_of_many_lengths_need_one_graph_per_size_and_window(counted):
    rng = np.random.default_rng(5)
    call = compiled_flex(counted)
    sizes = set()
    for _ in range(25):
        layout = random_layout(rng, int(rng.integers(100, 900)), head=7)
        sizes.add(padded_length(len(layout.end)))
        for window in (None, 30):
            parts = row(layout)
            found = flex_rows(*parts, layout, SCALE, window, call)
        assert torch.allclose(found.double(), reference(*parts, layout, 30), atol=1e-5)
    assert 4 <= len(sizes) <= 6  # of the 25 lengths, which lie between 108 and 1056
    assert counted.graphs == 2 * len(sizes)


def test_a_graph_too_many_is_an_error_that_names_the_way_round(counted, monkeypatch):
    monkeypatch.setattr(module, "MOST_GRAPHS", 2)
    call = compiled_flex(counted)
    layouts = [TreeLayout.build([length]) for length in (200, 300, 500)]
    for layout in layouts[:2]:
        flex_rows(*row(layout), layout, SCALE, None, call)
    with pytest.raises(UserError, match="more than 2 compiled graphs; the last row has 500 tokens") as error:
        flex_rows(*row(layouts[2]), layouts[2], SCALE, None, call)
    assert "model.attention=tree_sdpa" in error.value.fix
    assert counted.graphs == 2


def test_layers_that_are_compiled_themselves_call_the_same_graphs(counted):
    call = compiled_flex(counted)
    around = Counted()

    @torch.compile(backend=around)
    def layer(query, key, value, layout):
        return flex_rows(query * 2, key, value, layout, SCALE / 2, None, call) + 1

    for lengths in ([200, 20], [180, 60], [100, 100, 35]):
        layout = TreeLayout.build(lengths)
        parts = row(layout)
        found = layer(*parts, layout)
        assert torch.allclose(found.double(), reference(*parts, layout, None) + 1, atol=1e-5)
    assert counted.graphs == 1
    assert around.graphs <= 4  # before and after the attention, for one length and then for any


def test_the_tensors_of_a_block_mask_are_contiguous():
    """The kernels on a GPU read them so, whatever the strides say; those of a CPU obey the strides.

    On the first GPU, transposed indices gave keys and values the gradients of other blocks.
    """
    mask = layout_block_mask(TreeLayout.build([300, 200, 500], 90), 64, CPU)
    parts = {name: part for name, part in vars(mask).items() if isinstance(part, torch.Tensor)}
    assert len(parts) == 8
    for name, part in parts.items():
        assert part.is_contiguous(), name


def test_the_block_mask_is_made_once_per_layout_and_its_bytes_are_those_of_the_plan():
    layout = TreeLayout.build([300, 400, 90], 50)
    first = layout_block_mask(layout, None, CPU)
    assert layout_block_mask(layout, None, CPU) is first
    assert layout_block_mask(layout, 64, CPU) is not first
    held = [getattr(first, name) for name in first._TENSOR_ATTRS]
    held += [cell.cell_contents for cell in first.mask_mod.__closure__]
    found = sum(part.numel() * part.element_size() for part in held if isinstance(part, torch.Tensor))
    positions = 8 * first.seq_lengths[0]  # the rule without a window does not hold them
    assert found + positions == block_mask_bytes(len(layout.end))


@pytest.mark.slow
def test_the_compiled_kernel_of_this_processor_gives_the_same_forward():
    torch._dynamo.reset()
    layout = TreeLayout.build([60, 100, 30], 20)
    parts = row(layout)
    with torch.no_grad():
        for window in (None, 25):
            found = flex_rows(*parts, layout, SCALE, window)
            assert torch.allclose(found.double(), reference(*parts, layout, window), atol=1e-5)
