"""Constrained beam search over the catalogue trie, for parity with peers.

Follows transformers' constrained beam search step by step (2 x beams candidates, an item is kept when its
last token is among the first `beams` of them, a search ends when no open prefix can still enter the list),
for two step distributions: - `renormalised`: softmax over the allowed tokens (HF: renormalize_logits=True); -
`full`: softmax over the whole vocabulary, then masked (HF's default, which also divides by length:
length_penalty=1). A beam search may miss items, its list may be short, and it says nothing about the rank of
what it missed.
More beams than items: the list is the catalogue, as far as the search reaches it.
"""

from __future__ import annotations

import numpy as np
import torch

from eval.scoring.node_cache import NextTokens, NodeCache
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.inference.prompt_reader import PromptReader, PromptState


class _Beams:
    """Open prefixes (node, log-prob) and finished items (score, log-prob, entry) of one user."""

    def __init__(self, width: int, length_penalty: float):
        self.width, self.penalty = width, length_penalty
        self.open: list[tuple[int, float]] = [(0, 0.0)]
        self.finished: list[tuple[float, float, int]] = []

    def score(self, log_prob: float, tokens: int) -> float:
        return log_prob / tokens**self.penalty

    def step(self, candidates: list[tuple[float, int, int]], depth: int) -> None:
        """candidates: (log-prob, node, entry or -1) one token longer; `depth` tokens generated."""
        best = sorted(candidates, key=lambda c: (-c[0], c[1]))[: 2 * self.width]
        for place, (log_prob, _, entry) in enumerate(best):
            if entry >= 0 and place < self.width:
                self.finished.append((self.score(log_prob, depth), log_prob, entry))
        self.finished = sorted(self.finished, key=lambda f: (-f[0], f[2]))[: self.width]
        self.open = [(node, log_prob) for log_prob, node, entry in best if entry < 0][: self.width]
        if (
            self.open
            and len(self.finished) == self.width
            and self.finished[-1][0] >= self.score(self.open[0][1], depth)
        ):
            self.open = []


@torch.inference_mode()
def beam_search(
    reader: PromptReader,
    trie: TokenTrie,
    state: PromptState,
    beams: int = 10,
    scoring: str = "renormalised",
    length_penalty: float = 0.0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Beam search for a batch of prompts.

    Returns:
        per user: entries Long[<= beams], best first, and their scores float64 (log-prob / tokens **
            length_penalty).
    """
    cache, step = NodeCache(reader, trie, state), NextTokens(reader.rows, trie, scoring == "full")
    users = [_Beams(beams, length_penalty) for _ in range(state.batch)]
    depth = 0
    while True:
        active = [u for u in cache.users if users[u].open]
        if not active:
            break
        if len(active) <= len(cache.users) // 2:
            cache.keep(active)
        if depth == 0:
            hidden = cache.root_hidden[:, None]
        else:
            hidden = cache.expand([[node for node, _ in users[u].open] for u in cache.users])
        depth += 1
        for row, user in enumerate(cache.users):
            search = users[user]
            if not search.open:
                continue
            nodes = [node for node, _ in search.open]
            candidates = []
            for (node, log_prob), values in zip(
                search.open, step.log_probs(hidden[row, : len(nodes)], nodes), strict=True
            ):
                candidates += [
                    (log_prob + value, child, int(trie.entry[child]))
                    for child, value in zip(step.children(node).tolist(), values.tolist(), strict=True)
                ]
            search.step(candidates, depth)
    return [
        (
            np.array([entry for _, _, entry in search.finished], np.int64),
            np.array([score for score, _, _ in search.finished]),
        )
        for search in users
    ]
