"""Certified exact top-K without scoring the whole catalogue.

Extending a prefix never raises its log-probability, so the best open prefix bounds every item not found yet.
Once K found items score at least that bound, they are the exact top-K. Prefixes are opened best first, many
users and several prefixes at a time; a prefix is opened together with the single-child chain below it, which
costs no extra pass.

`result.certified` says how many places of the list are proven (a node budget may end a search early).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from eval.scoring.node_cache import NextTokens, NodeCache
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.inference.prompt_reader import PromptReader, PromptState

# Nodes forwarded per pass over all users. Below this a pass costs the reading of the weights, above it
# arithmetic.
NODES_PER_PASS = 48


@dataclass
class SearchResult:
    """One user's list.

    Attributes:
        entries: Long[k] entry numbers, best first; scores: float64[k].
        certified: how many leading places are proven exact.
        bound: no item outside `entries` scores more than this.
        expanded: trie nodes forwarded.
    """

    entries: np.ndarray
    scores: np.ndarray
    certified: int
    bound: float
    expanded: int


class _Search:
    """Frontier of one user. Heap items: (-log-prob, node)."""

    def __init__(self, k: int):
        self.k = k
        self.frontier = [(0.0, 0)]  # the root is open with log-prob 0
        self.found: list[tuple[float, int]] = []  # min-heap of the k best

    def bound(self) -> float:
        return -self.frontier[0][0] if self.frontier else -np.inf

    def worst(self) -> float:
        return self.found[0][0] if len(self.found) == self.k else -np.inf

    def done(self) -> bool:
        return self.bound() <= self.worst() or not self.frontier

    def add(self, score: float, entry: int) -> None:
        if len(self.found) < self.k:
            heapq.heappush(self.found, (score, -entry))
        else:
            heapq.heappushpop(self.found, (score, -entry))


def _chains(trie: TokenTrie) -> np.ndarray:
    """For every node: where its single-child chain ends (a branching node or a leaf)."""
    n = trie.num_nodes
    children = np.diff(trie.child_offsets)
    last = np.arange(n)
    single = np.flatnonzero(children == 1)
    order = np.argsort(
        -trie.depth[single], kind="stable"
    )  # deepest first: a child's chain is known before its parent's
    for nodes in np.split(single[order], np.flatnonzero(np.diff(trie.depth[single[order]])) + 1):
        last[nodes] = last[trie.child_nodes[trie.child_offsets[nodes]]]
    return last


class BestFirst:
    """Searches for one trie and scoring; `search(state, k)` for a batch of prompts.

    Args:
        max_nodes: per user; the search ends there, certified as far as proven. None = until certified.
    """

    def __init__(
        self,
        reader: PromptReader,
        trie: TokenTrie,
        scoring: str = "renormalised",
        max_nodes: int | None = None,
        nodes_per_pass: int = NODES_PER_PASS,
    ):
        self.reader, self.trie, self.full = reader, trie, scoring == "full"
        self.max_nodes, self.nodes_per_pass = max_nodes, nodes_per_pass
        self.chain_end = _chains(trie)
        self.step = NextTokens(reader.rows, trie, self.full)

    @torch.inference_mode()
    def search(self, state: PromptState, k: int) -> list[SearchResult]:
        """Top-k of every user of the batch; k larger than the catalogue gives the whole catalogue."""
        k = min(k, int((self.trie.entry >= 0).sum()))
        cache, searches = NodeCache(self.reader, self.trie, state), [_Search(k) for _ in range(state.batch)]
        for user, search in enumerate(searches):
            search.frontier = []
            self._descend(search, 0, 0.0, self.step.log_probs(state.hidden[user][None], [0])[0])
        while True:
            active = [u for u in cache.users if not self._over(searches[u], cache.num_expanded[u])]
            if not active:
                break
            if len(active) <= len(cache.users) // 2 or not cache.nodes.size:
                cache.keep(active)
            share = max(1, self.nodes_per_pass // len(active))
            opened = {user: self._open(searches[user], share) for user in active}
            hidden = cache.expand([sum(opened.get(u, {}).values(), []) for u in cache.users])
            rows, nodes, owners = [], [], []
            for row, user in enumerate(cache.users):
                place = 0
                for key, chain in opened.get(user, {}).items():
                    scored = range(len(chain)) if self.full else [len(chain) - 1]
                    for i in scored:
                        rows.append((row, place + i))
                        nodes.append(chain[i])
                    owners.append((user, key, chain, len(scored)))
                    place += len(chain)
            index = torch.tensor(rows, device=hidden.device)
            values = iter(self.step.log_probs(hidden[index[:, 0], index[:, 1]], nodes))
            for user, (negative, _), chain, count in owners:
                score = -negative
                steps = [next(values) for _ in range(count)]
                for before in steps[:-1]:
                    score += before[0]
                self._descend(searches[user], chain[-1], score, steps[-1])
        return [self._result(search, cache.num_expanded[u]) for u, search in enumerate(searches)]

    def _over(self, search: _Search, expanded: int) -> bool:
        return search.done() or (self.max_nodes is not None and expanded >= self.max_nodes)

    def _open(self, search: _Search, share: int) -> dict[tuple[float, int], list[int]]:
        """Takes prefixes that may still matter off the frontier, with their chains, until `share` nodes are
        reached.
        """
        opened, total = {}, 0
        while search.frontier and total < share and -search.frontier[0][0] > search.worst():
            key = heapq.heappop(search.frontier)
            node, chain = key[1], []
            # Leaves need no forward pass: a chain that ends in one stops at its parent.
            while True:
                chain.append(node)
                kids = self.step.children(node)
                if len(kids) != 1 or self.trie.entry[kids[0]] >= 0:
                    break
                node = int(kids[0])
            opened[key] = chain
            total += len(chain)
        return opened

    def _descend(self, search: _Search, node: int, score: float, log_probs: np.ndarray) -> None:
        """Adds the children of an opened node: items to the found ones, prefixes to the frontier."""
        for child, value in zip(self.step.children(node).tolist(), log_probs.tolist(), strict=True):
            total = score + (value if value == value else -np.inf)  # NaN: never found, never certified
            end = int(self.chain_end[child])
            if self.trie.entry[child] >= 0:
                search.add(total, int(self.trie.entry[child]))
            elif not self.full and self.trie.entry[end] >= 0:  # the rest of the title has probability 1
                search.add(total, int(self.trie.entry[end]))
            elif total > search.worst():
                heapq.heappush(search.frontier, (-total, child))

    @staticmethod
    def _result(search: _Search, expanded: int) -> SearchResult:
        found = sorted(search.found, key=lambda pair: (-pair[0], -pair[1]))
        scores = np.array([score for score, _ in found])
        bound = search.bound()
        certified = int((scores >= bound).sum())
        return SearchResult(
            np.array([-entry for _, entry in found], np.int64),
            scores,
            certified,
            max(bound, scores[-1] if len(scores) == search.k else -np.inf),
            expanded,
        )
