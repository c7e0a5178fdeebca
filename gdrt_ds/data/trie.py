"""The token trie over the catalogue, the only one there is.

The masked-softmax objective, exact scoring and constrained decoding share it.

Shapes: n trie nodes, E entries.
"""

from __future__ import annotations

import numpy as np

from gdrt_ds.errors import UserError


class TokenTrie:
    """A trie over token sequences: nodes in depth-first order, node 0 the root.

    Attributes:
        token: int32[n], token of the edge into the node; -1 at the root.
        parent: int32[n]; -1 at the root.
        depth: int32[n]; 0 at the root.
        end: int32[n], exclusive end of the node's subtree: a is an ancestor of m, or m itself, iff
            a <= m < end[a].
        entry: int32[n], index of the sequence that ends in this leaf, else -1.
        child_offsets, child_nodes: int64[n + 1] and int32[n - 1], children of a node, ascending in
            node id and in token (compressed sparse rows).
        branching: bool[n], whether the node has more than one child.
    """

    def __init__(
        self, token: np.ndarray, parent: np.ndarray, depth: np.ndarray, end: np.ndarray, entry: np.ndarray
    ):
        self.token = token
        self.parent = parent
        self.depth = depth
        self.end = end
        self.entry = entry
        self.num_nodes = len(token)
        num_children = np.bincount(parent[1:], minlength=self.num_nodes)
        self.child_offsets = np.concatenate([[0], np.cumsum(num_children)]).astype(np.int64)
        self.child_nodes = (np.argsort(parent[1:], kind="stable") + 1).astype(np.int32)
        self.branching = num_children > 1

    @classmethod
    def build(cls, sequences: list[list[int]], titles: list[str] | None = None) -> TokenTrie:
        """Builds the trie; sequence i ends in a leaf with `entry` i.

        Raises:
            UserError: there is no sequence, an empty one, two equal ones, or one that is a proper prefix
                of another; names the titles.
        """
        if not len(sequences):
            raise UserError(
                "the catalogue is empty: there is no token sequence to build a trie from",
                "check the item table",
            )
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        path = [0]  # nodes from the root to the last leaf
        previous: list[int] = []
        token = [-1]
        parent = [-1]
        depth = [0]
        ends = [0]
        leaves: list[tuple[int, int]] = []  # (node, index of the sequence)
        for index in order:
            sequence = sequences[index]
            common = 0
            for a, b in zip(previous, sequence):
                if a != b:
                    break
                common += 1
            if common == len(previous) and leaves or not len(sequence):
                _refuse(index, leaves[-1][1] if leaves else index, sequences, titles)
            start = len(token)
            for node in path[common + 1 :]:
                ends[node] = start
            del path[common + 1 :]
            for position in range(common, len(sequence)):
                parent.append(path[-1])
                path.append(len(token))
                token.append(sequence[position])
                depth.append(position + 1)
                ends.append(0)
            leaves.append((path[-1], index))
            previous = sequence
        for node in path:
            ends[node] = len(token)
        entry = np.full(len(token), -1, np.int32)
        entry[[node for node, _ in leaves]] = [index for _, index in leaves]

        def as_int32(values):
            return np.asarray(values, dtype=np.int32)

        return cls(as_int32(token), as_int32(parent), as_int32(depth), as_int32(ends), entry)

    def children(self, node: int) -> np.ndarray:
        """Returns the node ids of the children, int32[number of children], ascending in token."""
        return self.child_nodes[self.child_offsets[node] : self.child_offsets[node + 1]]

    def walk(self, tokens: list[int]) -> list[int]:
        """Returns the node before each token, [len(tokens)]; the first is the root.

        Raises:
            KeyError: the tokens leave the trie.
        """
        node = 0
        nodes = []
        for position, token in enumerate(tokens):
            nodes.append(node)
            children = self.children(node)
            found = int(np.searchsorted(self.token[children], token))
            if found == len(children) or self.token[children[found]] != token:
                raise KeyError(f"token {token} at position {position} leaves the catalogue trie")
            node = int(children[found])
        return nodes


def _refuse(index: int, earlier: int, sequences: list[list[int]], titles: list[str] | None) -> None:
    """Raises UserError for a sequence that is empty, or not told apart from an earlier one."""

    def name(i):
        return repr(titles[i]) if titles else f"entry {i}"

    if not len(sequences[index]):
        raise UserError(
            f"catalogue title {name(index)} has no tokens", "correct the title, or use another tokenizer"
        )
    relation = "are one a prefix of the other"
    if len(sequences[index]) == len(sequences[earlier]):
        relation = "are the same tokens"
    raise UserError(
        f"catalogue titles {name(earlier)} and {name(index)} {relation}: they cannot be told apart",
        "use a tokenizer that covers the titles (an unknown-word token hides differences), and sequences "
        "that end with a terminator",
    )
