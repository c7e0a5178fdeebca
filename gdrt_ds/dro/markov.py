"""What counting can tell from a history: the losses of a last-item Markov chain (`dro.excess=markov`).

The chain says how often one item follows another in train, backed by popularity:

    P(i | last item j) = (n_ji + s P(i)) / (n_j + s)

A title is several tokens, so the chain's loss of a token is that of the titles which still go on with it,
among those that went on with the tokens before. Every train window is left out of its own counts. Otherwise a
pair that comes once would look certain. The strength s of the popularity P is the one that gives the train
windows, each left out, the lowest loss.

Shapes: n windows, E entries, N target tokens.
"""

from __future__ import annotations

import numpy as np

from gdrt_ds.data.trie import TokenTrie

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Values of s that are tried."""

NO_HISTORY = -1


class MarkovLosses:
    """The losses of all target tokens of train, computed where they are asked for.

    Args:
        trie: of the catalogue's token sequences.
        nodes: int32, the node at which each token of each entry is chosen, entry after entry.
        offsets: int64[E + 1], which of them are whose.
        last: int32[n], the entry before each window's target; NO_HISTORY without one.
        targets: int32[n], the entry that is each window's target.
        target_offsets: int64[n + 1], which target tokens are whose.

    Attributes:
        strength: s.
        title_loss: nats, the mean loss of a train window's title, itself left out.
        popularity_loss: nats, the same of popularity alone.
    """

    def __init__(
        self,
        trie: TokenTrie,
        nodes: np.ndarray,
        offsets: np.ndarray,
        last: np.ndarray,
        targets: np.ndarray,
        target_offsets: np.ndarray,
    ):
        is_leaf = trie.entry >= 0
        before = np.concatenate([[0], np.cumsum(is_leaf)])  # leaves before each node, in the trie's order
        following = np.concatenate([nodes[1:], [0]])
        following[offsets[1:] - 1] = np.flatnonzero(is_leaf)[np.argsort(trie.entry[is_leaf])]
        self._here = before[nodes], before[trie.end[nodes]]
        self._chosen = before[following], before[trie.end[following]]
        self.offsets, self.last, self.targets, self.target_offsets = offsets, last, targets, target_offsets
        place = np.empty(len(offsets) - 1, dtype=np.int64)  # of an entry's leaf among the leaves
        place[trie.entry[is_leaf]] = np.arange(is_leaf.sum())
        self._num_entries = len(place)
        counts = np.bincount(place[targets], minlength=self._num_entries)
        self._popular = np.concatenate([[0], np.cumsum(counts + 1)])  # one more: no title is impossible
        known = last != NO_HISTORY
        pairs, times = np.unique(self._key(last[known], place[targets[known]]), return_counts=True)
        self._pairs, self._times = pairs, np.concatenate([[0], np.cumsum(times)])
        self._fit(place)

    def __len__(self) -> int:
        """N."""
        return int(self.target_offsets[-1])

    def __getitem__(self, tokens: np.ndarray) -> np.ndarray:
        """float64: the losses of target tokens, by their places in the split's flat array."""
        owner = np.searchsorted(self.target_offsets, tokens, side="right") - 1
        case = self.offsets[self.targets[owner]] + tokens - self.target_offsets[owner]
        last = self.last[owner]
        here = self._weight(last, self._here[0][case], self._here[1][case], self.strength)
        chosen = self._weight(last, self._chosen[0][case], self._chosen[1][case], self.strength)
        return np.log(here) - np.log(chosen)

    def describe(self) -> str:
        """One line to announce."""
        return (
            f"dro.excess: a last-item Markov chain of the train windows, each left out of its own counts, "
            f"has {self.title_loss:.3f} nats a title (popularity {self.popularity_loss:.3f}); strength of "
            f"the popularity {self.strength:g}"
        )

    def _fit(self, place: np.ndarray) -> None:
        """Chooses s."""
        low = place[self.targets]
        everything = np.zeros_like(low), np.full_like(low, self._num_entries)
        mean = {}
        for strength in (*STRENGTHS, np.inf):
            chosen = self._weight(self.last, low, low + 1, strength)
            mean[strength] = float(np.mean(np.log(self._weight(self.last, *everything, strength) / chosen)))
        self.popularity_loss = mean.pop(np.inf)
        self.strength = min(mean, key=mean.__getitem__)
        self.title_loss = mean[self.strength]

    def _weight(self, last: np.ndarray, low: np.ndarray, high: np.ndarray, strength: float) -> np.ndarray:
        """float64: the chain's weight of the leaves low .. high - 1, which hold a window's own target.

        The window itself is left out. Infinite strength gives popularity alone.
        """
        popular = (self._popular[high] - self._popular[low] - 1) / (self._popular[-1] - 1)
        if np.isinf(strength):
            return popular
        known = last != NO_HISTORY
        after = self._before(last, high) - self._before(last, low) - 1
        return strength * popular + np.where(known, after, 0)

    def _before(self, last: np.ndarray, leaf: np.ndarray) -> np.ndarray:
        """Pairs that come before (last, leaf)."""
        return self._times[np.searchsorted(self._pairs, self._key(last, leaf))]

    def _key(self, last: np.ndarray, leaf: np.ndarray) -> np.ndarray:
        """int64, in the order of (last, leaf)."""
        return last.astype(np.int64) * (self._num_entries + 1) + leaf
