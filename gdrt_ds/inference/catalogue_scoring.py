"""Exact scores of the whole catalogue: its token trie goes through the model behind each prompt, as a tree.

`CatalogueScorer(reader, trie).score(prompts)` gives log P(item | prompt) of every item, float64 [B, items].
tests/eval/test_scoring_exact.py compares it with scoring every item by a plain forward pass
(`eval.scoring.per_item`).

There are two scorings:

- `renormalised`: softmax over the trie's allowed next tokens. A node with a single child hands on probability
  1, so only branching nodes and their ancestors are forwarded, and the head needs only the rows of the
  children.
- `full`: softmax over the whole vocabulary at every internal node, summed along the title, without a length
  penalty.

Nodes stand in depth-first order, so any slice [s, e) of them, together with the ancestors of s, is closed
under "ancestor of". The tree is cut into such slices. A slice forwards at most `depth` nodes again, and no
slice needs another one. `max_bytes` bounds the memory through the slice length, whatever the size of the
catalogue.

Shapes: B users, T nodes of a slice, P cached prompt tokens, E edges (children of scored nodes), H hidden, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.batches.tree_attention import tree_mask
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.inference.prompt_reader import PromptReader, PromptState
from gdrt_ds.runtime.devices import to_device

Scoring = Literal["renormalised", "full"]
SCORINGS = ("renormalised", "full")

_TOKENS_PER_SLICE = {"cpu": 768, "cuda": 8192}
"""Longer slices gain nothing on CPUs (the matrix products are saturated) and lose cache locality; see
benchmarks/scoring.py."""

_WIDE_NODE = 32
"""Number of children from which a matrix product beats gathering one hidden row per child."""


def scored_nodes(trie: TokenTrie, scoring: Scoring) -> np.ndarray:
    """Returns bool[n]: the nodes whose next-token distribution the scoring needs.

    Raises:
        UserError: there is no such scoring.
    """
    if scoring not in SCORINGS:
        raise UserError(f"scoring `{scoring}` is unknown", f"choose one of {', '.join(SCORINGS)}")
    if scoring == "renormalised":
        return np.asarray(trie.branching, dtype=bool)
    return np.diff(trie.child_offsets) > 0


@dataclass(frozen=True)
class Slice:
    """Nodes forwarded together: the path to the first one, then a depth-first interval of forwarded nodes.

    Attributes:
        tokens, depths, ends: Long[T]; depth 1 is the first token of an item, ends index into the slice.
        scored: Long[K], places in the slice of the nodes whose children are scored here.
        edges: the part of the edge arrays that these nodes own. Edges of consecutive scored nodes are
            consecutive.
        owner: Long[E'], place in the slice of each edge's node.
    """

    tokens: Tensor
    depths: Tensor
    ends: Tensor
    scored: Tensor
    edges: slice
    owner: Tensor


class TreePlan:
    """What to forward and how to add up, for one trie and one scoring; plain arrays, no model.

    Edges are the children of scored nodes, grouped by node in depth-first order.

    Attributes:
        num_entries: items of the catalogue.
        nodes: nodes to forward, depth-first.
        scored: nodes whose children are scored, depth-first; the root is the first if it is scored.
        edge_offsets: [scored + 1], where the edges of each scored node begin.
        edge_token: [E], token of each edge.
        edge_node: [E], place of the edge's node in `scored`.
        edge_parent: [E], the next edge above, -1 at the top.
        levels: edges by the number of edges above them.
        entry_edge: [items], the last edge on each item's path; -1 if the path has none, which is a catalogue
            of one item.
        max_depth: tokens of the longest item.
    """

    def __init__(self, trie: TokenTrie, scoring: Scoring):
        scored = scored_nodes(trie, scoring)
        self.num_entries = int((trie.entry >= 0).sum())
        n = trie.num_nodes
        end = trie.end.astype(np.int64)
        # A node is forwarded if its subtree holds a scored node. The root is the last prompt token, which is
        # never forwarded.
        before = np.concatenate([[0], np.cumsum(scored)])
        forwarded = before[end] > before[np.arange(n)]
        forwarded[0] = False
        self.nodes = np.flatnonzero(forwarded)
        self.scored = np.flatnonzero(scored)
        offsets = trie.child_offsets
        counts = (offsets[self.scored + 1] - offsets[self.scored]).astype(np.int64)
        self.edge_offsets = np.concatenate([[0], np.cumsum(counts)])
        # The empty array stands for a catalogue of one item, where nothing is scored.
        children = [trie.child_nodes[offsets[v] : offsets[v + 1]] for v in self.scored]
        child = np.concatenate([np.zeros(0, np.int64), *children]).astype(np.int64)
        self.edge_token = trie.token[child].astype(np.int64)
        self.edge_node = np.repeat(np.arange(len(self.scored)), counts)
        # The nearest edge at or above every node, and how many edges are above it: top-down, one depth at a
        # time.
        edge_above = np.full(n, -1, np.int64)
        num_above = np.zeros(n, np.int64)
        edge_above[child] = np.arange(len(child))
        by_depth = np.split(np.argsort(trie.depth, kind="stable"), np.cumsum(np.bincount(trie.depth))[:-1])
        for nodes in by_depth[1:]:
            above = trie.parent[nodes]
            fresh = edge_above[nodes] >= 0
            edge_above[nodes] = np.where(fresh, edge_above[nodes], edge_above[above])
            num_above[nodes] = num_above[above] + fresh
        self.edge_parent = edge_above[self.scored][self.edge_node]
        level = num_above[child] - 1
        self.levels = [np.flatnonzero(level == k) for k in range(int(level.max(initial=-1)) + 1)]
        leaves = np.flatnonzero(trie.entry >= 0)
        self.entry_edge = np.full(self.num_entries, -1, np.int64)
        self.entry_edge[trie.entry[leaves]] = edge_above[leaves]
        self.max_depth = int(trie.depth.max())
        self._trie = trie
        self._end = end

    def edges_of(self, entries: list[int]) -> np.ndarray:
        """Returns bool[E]: the edges on the paths of these entries."""
        found = np.zeros(len(self.edge_token), dtype=bool)
        edges = self.entry_edge[entries]
        while len(edges := edges[edges >= 0]):
            found[edges] = True
            edges = self.edge_parent[edges]
        return found

    def slices(self, length: int) -> list[Slice]:
        """Cuts the forwarded nodes into slices of at most `length` own nodes (ancestors come on top)."""
        trie = self._trie
        result = []
        is_scored = np.isin(self.nodes, self.scored)
        first_edge_node = np.searchsorted(self.scored, self.nodes)  # place among scored nodes
        for start in range(0, len(self.nodes), length):
            own = self.nodes[start : start + length]
            path = []
            node = int(trie.parent[own[0]])
            while node > 0:
                path.append(node)
                node = int(trie.parent[node])
            places = np.concatenate([np.array(path[::-1], np.int64), own])
            scored = np.flatnonzero(is_scored[start : start + length])
            if not len(scored):
                # Nothing to score here: its nodes are ancestors, forwarded again where they are needed.
                continue
            rank = first_edge_node[start : start + length][scored]
            edges = slice(int(self.edge_offsets[rank[0]]), int(self.edge_offsets[rank[-1] + 1]))
            owner = np.searchsorted(rank, self.edge_node[edges])
            result.append(
                Slice(
                    tokens=_long(trie.token[places]),
                    depths=_long(trie.depth[places]),
                    ends=_long(np.searchsorted(places, self._end[places])),
                    scored=_long(len(path) + scored),
                    edges=edges,
                    owner=_long(len(path) + scored[owner]),
                )
            )
        return result


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


class CatalogueScorer:
    """Log-probabilities of all catalogue entries, exactly.

    Args:
        reader: the model and the constant head of its prompts.
        trie: token trie of the catalogue.
        scoring: `renormalised` or `full`.
        max_bytes: bound on the working memory of one slice (activations, masks, head), beside weights and
            prompt cache.
        tokens_per_slice: users x nodes forwarded at once; None = by device.

    Raises:
        UserError: unknown scoring, or a bound too small for one user.
    """

    def __init__(
        self,
        reader: PromptReader,
        trie: TokenTrie,
        scoring: Scoring = "renormalised",
        max_bytes: int = 2 << 30,
        tokens_per_slice: int | None = None,
    ):
        self.reader = reader
        self.trie = trie
        self.scoring = scoring
        self.plan = TreePlan(trie, scoring)
        self.max_bytes = max_bytes
        self.tokens_per_slice = tokens_per_slice or _TOKENS_PER_SLICE.get(reader.device.type, 4096)
        self.edge_token = to_device(self.plan.edge_token, reader.device)
        self._slices: dict[int, list[Slice]] = {}

    @property
    def nodes_forwarded(self) -> int:
        """Nodes of the trie that go through the model for each prompt."""
        return len(self.plan.nodes)

    def bytes_per_token(self, keys: int) -> int:
        """Returns an upper estimate of the memory of one node against `keys` cached and new columns."""
        config = self.reader.config
        size = torch.empty((), dtype=self.reader.mask_dtype).element_size()
        hidden = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        heads = config.num_attention_heads
        scores = 2 * keys * size
        if config._attn_implementation == "eager":
            scores = heads * keys * (size + 4)
        masks = keys * (2 + size) * (2 if self.reader.windows else 1)
        return size * (8 * hidden + 3 * inner) + scores + masks

    def slice_length(self, batch: int, past: int) -> int:
        """Returns the nodes per slice that keep `max_bytes`, at most `tokens_per_slice / batch`.

        Raises:
            UserError: one node is too much already.
        """
        depth = self.plan.max_depth
        length = max(32, self.tokens_per_slice // batch)
        while length > 1 and batch * length * self.bytes_per_token(past + length + depth) > self.max_bytes:
            length = (length + 1) // 2 if length > 2 else 1
        least = batch * (1 + depth) * self.bytes_per_token(past + 1 + depth)
        if length == 1 and least > self.max_bytes:
            raise UserError(
                f"max_score_bytes = {self.max_bytes} does not hold one step of {batch} users",
                "raise it, or lower --batch-size",
            )
        return length

    @torch.inference_mode()
    def score(self, prompts: list[list[int]]) -> Tensor:
        """Returns float64 [B, items] log-probabilities, on the CPU.

        Args:
            prompts: token lists that start with the reader's prefix.
        """
        self.reader.check_length(max(map(len, prompts)) + self.plan.max_depth - 1)
        return self.score_state(self.reader.read(prompts))

    @torch.inference_mode()
    def score_state(self, state: PromptState, entries: list[int] | None = None) -> Tensor:
        """Scores behind prompts that were read already.

        Args:
            entries: the only entries that are wanted, float64 [B, len(entries)]. Slices that their paths do
                not touch are left out; the others are the same computation as for the whole catalogue.
        """
        plan = self.plan
        batch = state.batch
        wanted = np.ones(len(plan.edge_token), dtype=bool)
        if entries is not None:
            wanted = plan.edges_of(entries)
        logits = torch.empty(batch, len(plan.edge_token), dtype=torch.float32, device=self.reader.device)
        normaliser = None
        if self.scoring == "full":
            normaliser = torch.empty(batch, len(plan.scored), dtype=torch.float32, device=self.reader.device)
        if len(plan.scored) and plan.scored[0] == 0:
            count = int(plan.edge_offsets[1])
            self._edge_logits(
                state.hidden[:, None], torch.zeros(count, dtype=torch.long), slice(0, count), logits
            )
            if normaliser is not None:
                normaliser[:, 0] = self._log_normaliser(state.hidden)
        length = self.slice_length(batch, state.visible.shape[1])
        if length not in self._slices:
            self._slices = {length: plan.slices(length)}
        for part in self._slices[length]:
            if not wanted[part.edges].any():
                continue
            hidden = self._forward(part, state)
            self._edge_logits(hidden, part.owner, part.edges, logits)
            if normaliser is not None:
                nodes = slice(
                    int(plan.edge_node[part.edges.start]), int(plan.edge_node[part.edges.stop - 1]) + 1
                )
                chosen = hidden[:, to_device(part.scored, hidden.device)]
                normaliser[:, nodes] = self._log_normaliser(chosen.flatten(0, 1)).view(batch, -1)
        scores = self._add_up(logits, normaliser)
        if entries is None:
            return scores
        return scores[:, entries]

    def _forward(self, part: Slice, state: PromptState) -> Tensor:
        """Returns the hidden states [B, T, H] of a slice behind the prompts."""
        device = self.reader.device
        batch = state.batch
        positions = state.lengths[:, None] + to_device(part.depths, device)[None] - 1
        tree = to_device(tree_mask(part.ends)[None], device)
        if not state.padded and self.reader.windows is None and self.reader.window is None:
            visible = torch.cat([tree.new_ones(1, tree.shape[1], state.visible.shape[1]), tree], dim=2)
        else:
            visible = torch.cat(
                [state.visible[:, None].expand(batch, tree.shape[1], -1), tree.expand(batch, -1, -1)], dim=2
            )
        hidden, _ = self.reader.run(
            to_device(part.tokens, device)[None].expand(batch, -1),
            positions,
            visible,
            state.past,
            state.positions,
        )
        return hidden

    def _edge_logits(self, hidden: Tensor, owner: Tensor, edges: slice, logits: Tensor) -> None:
        """Writes logits[:, edges] from hidden [B, T, H]; `owner` Long[E'] is each edge's place in T."""
        head = self.reader.rows
        device = hidden.device
        batch = hidden.shape[0]
        unique, counts = torch.unique_consecutive(owner, return_counts=True)
        starts = torch.cumsum(counts, 0) - counts
        narrow = torch.ones(len(owner), dtype=torch.bool)
        for place, start, count in zip(*(t[counts >= _WIDE_NODE].tolist() for t in (unique, starts, counts))):
            narrow[start : start + count] = False
            for low in range(start, start + count, 1 << 16):
                span = slice(edges.start + low, edges.start + min(low + (1 << 16), start + count))
                weight, bias = head.rows(self.edge_token[span])
                product = hidden[:, place].float() @ weight.T
                logits[:, span] = head.finish(product if bias is None else product + bias)
        rest = narrow.nonzero().flatten()
        step = max(1, min(self.max_bytes // 8, 64 << 20) // (4 * (batch + 1) * hidden.shape[-1]))
        for chunk in rest.split(step):
            places = to_device(chunk + edges.start, device)
            weight, bias = head.rows(self.edge_token[places])
            product = torch.einsum("beh,eh->be", hidden[:, to_device(owner[chunk], device)].float(), weight)
            logits[:, places] = head.finish(product if bias is None else product + bias)

    def _log_normaliser(self, hidden: Tensor) -> Tensor:
        """Returns the log of the sum over the whole vocabulary, float32 [N], for hidden states [N, H].

        A bounded number of rows is computed at a time.
        """
        rows = max(1, min(self.max_bytes // 4, 256 << 20) // (8 * self.reader.rows.weight.shape[0]))
        return torch.cat(
            [self.reader.rows.vocabulary_logits(part).logsumexp(-1) for part in hidden.split(rows)]
        )

    def _add_up(self, logits: Tensor, normaliser: Tensor | None) -> Tensor:
        """Returns log-probabilities of the entries [B, items] from edge logits [B, E].

        It is a log-softmax per node, and then sums down the tree.
        """
        plan = self.plan
        batch = logits.shape[0]
        value = logits.double().cpu()
        node = torch.from_numpy(plan.edge_node)
        if normaliser is None:
            index = node[None].expand(batch, -1)
            top = torch.full((batch, len(plan.scored)), -torch.inf, dtype=value.dtype)
            top = top.scatter_reduce(1, index, value, "amax")
            total = torch.zeros_like(top).scatter_add_(1, index, (value - top[:, node]).exp())
            log_total = top + total.log()
        else:
            log_total = normaliser.double().cpu()
        value = value - log_total[:, node]
        parent = torch.from_numpy(plan.edge_parent)
        for level in plan.levels[1:]:
            places = torch.from_numpy(level)
            value[:, places] += value[:, parent[places]]
        entry_edge = torch.from_numpy(plan.entry_edge)
        scores = value.new_zeros(batch, plan.num_entries)
        on_tree = entry_edge >= 0
        scores[:, on_tree] = value[:, entry_edge[on_tree]]
        return scores
