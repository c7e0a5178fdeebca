"""One visibility rule: the dense mask equals brute force, and packed rows give a model's padded hidden states
and gradients.
"""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import flex_attention

from gdrt_ds.batches import build_micro_batch, layout
from gdrt_ds.batches.flex_rows import flex_rows
from gdrt_ds.batches.prefix_tree import Chain, merge_prefixes
from gdrt_ds.batches.tree_attention import ATTENTION_NAME, TreeLayout, _segments, tree_mask
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.models.families import decoder

SIZES = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
    initializer_range=0.2,
)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    ),
    "phi": ("PhiConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
HEAD = 4


def make_store() -> TokenStore:
    rng = np.random.default_rng(3)
    head, targets = rng.integers(3, 120, HEAD), np.array([2, 3, 1, 4], np.int32)
    rows = [np.concatenate([head, rng.integers(3, 120, n)]) for n in (9, 5, 14, 7)]

    def sums(v):
        return np.concatenate([[0], np.cumsum(v)]).astype(np.int64)

    ids = np.concatenate(rows).astype(np.int32)
    return TokenStore(ids, sums([len(r) for r in rows]), np.zeros(len(ids), np.int8), targets, sums(targets))


def make_model(family: str, attention: str):
    name, changes = FAMILIES[family]
    keep = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    config = getattr(transformers, name)(
        **{**{k: v for k, v in SIZES.items() if family != "gpt2" or k in keep}, **changes},
        attn_implementation=attention,
    )
    for attribute in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, attribute):
            setattr(config, attribute, 0.0)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def store_of(rows: list[np.ndarray], targets: np.ndarray) -> TokenStore:
    def sums(v):
        return np.concatenate([[0], np.cumsum(v)]).astype(np.int64)

    ids = np.concatenate(rows).astype(np.int32)
    return TokenStore(ids, sums([len(r) for r in rows]), np.zeros(len(ids), np.int8), targets, sums(targets))


def random_tree_store(seed: int) -> TokenStore:
    """Samples that share prefixes of all lengths: growing, nested, equal; targets on shared tokens too."""
    rng = np.random.default_rng(seed)
    trunk = rng.integers(3, 120, 14)
    rows = []
    for _ in range(7):
        kept = trunk[: rng.integers(1, 14)]
        rows.append(np.concatenate([kept, rng.integers(3, 6, rng.integers(2, 5))]))
    rows += [rows[0], np.concatenate([rows[1], rng.integers(3, 6, 3)]), trunk[:2]]
    targets = np.array([rng.integers(1, len(row)) for row in rows], np.int32)
    return store_of(rows, targets)


def hidden_and_gradients(model, packing: str, store: TokenStore | None = None):
    store = store or make_store()
    micro = build_micro_batch(store, np.arange(len(store)), packing, HEAD, 2)
    states = decoder(model)(**micro.inputs, use_cache=False).last_hidden_state
    hidden = states.reshape(-1, states.shape[-1])[micro.supervised]
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_rows_give_the_padded_hidden_states_and_gradients(family):
    hidden, gradients = hidden_and_gradients(make_model(family, "eager"), "none")
    for packing in ("packed", "shared_prefix", "prefix_tree"):
        packed, packed_gradients = hidden_and_gradients(make_model(family, ATTENTION_NAME), packing)
        assert torch.allclose(packed, hidden, atol=2e-5), (packing, float((packed - hidden).abs().max()))
        assert set(packed_gradients) == set(gradients)
        for name, wanted in gradients.items():
            assert (packed_gradients[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6, (packing, name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_merged_prefixes_give_the_padded_hidden_states_and_gradients(family, seed):
    store = random_tree_store(seed)
    hidden, gradients = hidden_and_gradients(make_model(family, "eager"), "none", store)
    merged, merged_gradients = hidden_and_gradients(make_model(family, ATTENTION_NAME), "prefix_tree", store)
    assert torch.allclose(merged, hidden, atol=2e-5), float((merged - hidden).abs().max())
    for name, wanted in gradients.items():
        assert (merged_gradients[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6, name


def test_a_chain_that_sees_a_branch_beside_it_is_found(monkeypatch):
    """The planted leak: a chain looks at one token more than the way to it has."""
    store = random_tree_store(0)
    hidden, _ = hidden_and_gradients(make_model("llama", "eager"), "none", store)
    merge = layout.merge_prefixes

    def leaking(rows):
        tree = merge(rows)
        chain = tree.chains[1]
        tree.chains[1] = Chain(chain.length, chain.parent, chain.depth + 1)
        return tree

    monkeypatch.setattr(layout, "merge_prefixes", leaking)
    merged, _ = hidden_and_gradients(make_model("llama", ATTENTION_NAME), "prefix_tree", store)
    assert float((merged - hidden).abs().max()) > 1e-3


def random_tree(rng, size: int):
    """(end, parent, depth) of a random forest in depth-first order."""
    parent, depth = np.full(size, -1), np.zeros(size, dtype=int)
    for node in range(1, size):
        path, at = [-1], node - 1
        while at >= 0:
            path.append(at)
            at = parent[at]
        parent[node] = path[rng.integers(len(path))]
        depth[node] = 0 if parent[node] < 0 else depth[parent[node]] + 1
    end = np.array(
        [next((m for m in range(n + 1, size) if n not in ancestors(parent, m)), size) for n in range(size)]
    )
    return end, parent, depth


def ancestors(parent, node):
    found = {node}
    while parent[node] >= 0:
        node = parent[node]
        found.add(node)
    return found


@pytest.mark.parametrize("window", [None, 3])
def test_tree_mask_is_ancestor_or_self_and_nothing_else(window):
    rng = np.random.default_rng(0)
    for _ in range(20):
        end, parent, depth = random_tree(rng, 18)
        mask = tree_mask(torch.from_numpy(end), past=2, positions=torch.from_numpy(depth), window=window)
        for query in range(18):
            seen = {k for k in ancestors(parent, query) if window is None or depth[query] - depth[k] < window}
            assert set(mask[query, 2:].nonzero().view(-1).tolist()) == seen and mask[query, :2].all()


@pytest.mark.parametrize("head,window", [(0, None), (3, None), (0, 4), (3, 4)])
def test_per_sample_attention_follows_the_dense_mask(head, window):
    row = TreeLayout.build([5, 1, 7], head)
    total = head + 13
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
    mask = tree_mask(row.end, positions=row.positions, window=window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    assert torch.allclose(_segments(query, key, value, row, 0.3, 0.0, window), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seed", range(5))
def test_both_executions_follow_the_dense_mask_on_any_tree(seed, window):
    store = random_tree_store(seed)
    tree = merge_prefixes([store.row(sample) for sample in range(len(store))])
    layout_of_tree = TreeLayout.of_tree(tree)
    generator = torch.Generator().manual_seed(seed)
    total = len(tree.tokens)
    query, key, value = (torch.randn(1, heads, total, 8, generator=generator) for heads in (4, 2, 2))
    mask = tree_mask(layout_of_tree.end, positions=layout_of_tree.positions, window=window)
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    found = _segments(query, key, value, layout_of_tree, 0.3, 0.0, window)
    assert torch.allclose(found, wanted, atol=1e-5)
    found = flex_rows(query, key, value, layout_of_tree, 0.3, window, call=flex_attention)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_padding_token_sees_only_itself():
    mask = tree_mask(torch.tensor([3, 3, 3, 4, 5]))
    assert mask.tolist() == [
        [True] + [False] * 4,
        [True, True] + [False] * 3,
        [True] * 3 + [False] * 2,
        [False] * 3 + [True, False],
        [False] * 4 + [True],
    ]


def test_masks_live_as_long_as_their_layout_and_its_layers_share_them():
    """They grow with the square of a sample's length, and lengths differ from batch to batch."""
    rows = TreeLayout.build([3, 5], head=2)
    query = torch.randn(1, 2, 10, 4)
    first = _segments(query, query, query, rows, None, 0.0, None)
    masks = [weakref.ref(mask) for mask in rows.chain_masks.values()]
    assert len(masks) == 2
    assert torch.equal(_segments(query, query, query, rows, None, 0.0, None), first)
    assert [id(mask) for mask in rows.chain_masks.values()] == [id(mask()) for mask in masks]
    del rows
    assert [mask() for mask in masks] == [None, None]
