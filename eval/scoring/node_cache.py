"""Searches expand chosen trie nodes behind a batch of prompts; their keys and values are kept.

A node of the trie is a prefix, and two prefixes share their ancestors, so beams and frontiers need no cache
reordering: an expanded node sees the prompt and those cached nodes whose subtree interval contains it.

Shapes: B users, T nodes expanded now (padded), N nodes expanded before (padded), H hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.inference.prompt_reader import LmHeadRows, PromptReader, PromptState

_PADDING = -1


class NodeCache:
    """Expanded nodes of each user and their keys and values.

    Args:
        reader, trie: model and catalogue.
        state: prompts that were read; its tensors are not changed.
    """

    def __init__(self, reader: PromptReader, trie: TokenTrie, state: PromptState):
        self.reader, self.trie = reader, trie
        self.past = list(state.past)
        self.visible = state.visible
        self.positions = state.positions
        self.lengths = state.lengths
        self.root_hidden = state.hidden
        self.nodes = np.empty((state.batch, 0), np.int64)
        self.users = list(range(state.batch))
        self.num_expanded, self.num_passes = [0] * state.batch, 0

    def keep(self, users: list[int]) -> None:
        """Drops all but these users (numbers of the original batch) from the cache."""
        rows = torch.tensor([self.users.index(user) for user in users], device=self.reader.device)
        self.past = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.past]
        self.visible, self.positions = self.visible[rows], self.positions[rows]
        self.lengths, self.root_hidden = self.lengths[rows], self.root_hidden[rows]
        self.nodes, self.users = self.nodes[rows.cpu().numpy()], list(users)

    def expand(self, chosen: list[list[int]]) -> Tensor:
        """Forwards nodes, one list per cached user; a node's parents stand before it in its list or were
        expanded before.

        Returns:
            hidden [B, T, H]; row u, place i belongs to chosen[u][i].
        """
        device, trie, batch = self.reader.device, self.trie, len(chosen)
        width = max(map(len, chosen))
        new = np.full((batch, width), _PADDING, np.int64)
        for row, nodes in enumerate(chosen):
            new[row, : len(nodes)] = nodes
            self.num_expanded[self.users[row]] += len(nodes)
        self.num_passes += 1
        real = new >= 0
        tokens = torch.from_numpy(np.where(real, trie.token[new], 0).astype(np.int64)).to(device)
        depth = torch.from_numpy(np.where(real, trie.depth[new], 1).astype(np.int64)).to(device)
        positions = self.lengths[:, None] + depth - 1
        keys = np.concatenate([self.nodes, new], axis=1)
        key_end = np.where(keys >= 0, trie.end[keys], _PADDING)
        seen = (
            (keys[:, None, :] <= new[:, :, None]) & (new[:, :, None] < key_end[:, None, :]) & real[:, :, None]
        )
        seen[:, np.arange(width), self.nodes.shape[1] + np.arange(width)] = (
            True  # itself; padding sees nothing else
        )
        prompt = self.visible[:, None, :].expand(-1, width, -1)
        hidden, _ = self.reader.run(
            tokens,
            positions,
            torch.cat([prompt, torch.from_numpy(seen).to(device)], 2),
            self.past,
            self._key_positions(),
            grow=True,
        )
        self.nodes = keys
        return hidden

    def _key_positions(self) -> Tensor:
        depth = torch.from_numpy(np.where(self.nodes >= 0, self.trie.depth[self.nodes], 1).astype(np.int64))
        return torch.cat([self.positions, self.lengths[:, None] + depth.to(self.lengths.device) - 1], 1)


class NextTokens:
    """Log-probabilities of trie children from hidden states, under one scoring."""

    def __init__(self, head: LmHeadRows, trie: TokenTrie, full: bool):
        self.head, self.trie, self.full = head, trie, full

    def children(self, node: int) -> np.ndarray:
        return self.trie.child_nodes[self.trie.child_offsets[node] : self.trie.child_offsets[node + 1]]

    def log_probs(self, hidden: Tensor, nodes: list[int]) -> list[np.ndarray]:
        """hidden [N, H] of N nodes -> per node float64 log-probabilities of its children, in the trie's
        order.
        """
        kids = [self.children(node) for node in nodes]
        counts = np.array([len(k) for k in kids])
        if not counts.sum():
            return [np.zeros(0) for _ in nodes]
        tokens = torch.from_numpy(self.trie.token[np.concatenate(kids)].astype(np.int64)).to(hidden.device)
        owner = torch.from_numpy(np.repeat(np.arange(len(nodes)), counts)).to(hidden.device)
        if self.full:
            rows = max(1, (128 << 20) // (8 * self.head.weight.shape[0]))
            parts = []
            for low in range(0, len(nodes), rows):
                logits = self.head.vocabulary_logits(hidden[low : low + rows])
                mine = (owner >= low) & (owner < low + rows)
                value = (
                    logits[owner[mine] - low, tokens[mine]].double()
                    - logits.logsumexp(-1).double()[owner[mine] - low]
                )
                parts.append(value.cpu().numpy())
            flat = np.concatenate(parts)
            return np.split(flat, np.cumsum(counts)[:-1])
        result, offsets = [], np.concatenate([[0], np.cumsum(counts)])
        hidden = hidden.float()
        for i in range(len(nodes)):
            weight, bias = self.head.rows(tokens[offsets[i] : offsets[i + 1]])
            logits = weight @ hidden[i]
            logits = self.head.finish(logits if bias is None else logits + bias).double()
            result.append((logits - logits.logsumexp(-1)).cpu().numpy())
        return result


@torch.inference_mode()
def path_scores(
    reader: PromptReader, trie: TokenTrie, state: PromptState, entries: list[int], scoring: str
) -> np.ndarray:
    """Exact log-probability of one entry per user (e.g. its target), one pass. float64 [B]."""
    leaves = np.flatnonzero(trie.entry >= 0)
    leaf_of = dict(zip(trie.entry[leaves].tolist(), leaves.tolist(), strict=True))
    paths = []
    for entry in entries:
        path, node = [], leaf_of[entry]
        while node > 0:
            path.append(node)
            node = int(trie.parent[node])
        paths.append(path[::-1])
    cache, step = NodeCache(reader, trie, state), NextTokens(reader.rows, trie, scoring == "full")
    inner = [
        path[:-1] or path for path in paths
    ]  # the leaf's own hidden state is not needed, a pass needs a token
    hidden = cache.expand(inner)
    scores = np.zeros(len(entries))
    for user, path in enumerate(paths):
        nodes = [0] + path[:-1]
        states = torch.cat([state.hidden[user][None], hidden[user, : len(path) - 1]])
        for node, after, values in zip(nodes, path, step.log_probs(states, nodes), strict=True):
            scores[user] += values[np.flatnonzero(step.children(node) == after)[0]]
    return scores
