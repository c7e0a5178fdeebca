"""The reference that all other scorers must equal: a plain forward pass of prompt + item for every item.

No cache, no tree, no explicit mask or position: whatever transformers does by itself for this model family.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gdrt_ds.data.trie import TokenTrie


@torch.inference_mode()
def per_item_scores(
    model: nn.Module,
    trie: TokenTrie,
    prompt: list[int],
    entries: list[int] | None = None,
    scoring: str = "renormalised",
) -> Tensor:
    """Log-probabilities of items behind one prompt.

    Args:
        model: causal LM (its own forward is called, one item at a time).
        prompt: token ids.
        entries: entry numbers of the trie; None = all.
    Returns:
        float64 [len(entries)].
    """
    leaves = np.flatnonzero(trie.entry >= 0)
    leaf_of = dict(zip(trie.entry[leaves].tolist(), leaves.tolist(), strict=True))
    device = next(model.parameters()).device
    scores = []
    for entry in sorted(leaf_of) if entries is None else entries:
        path, node = [], leaf_of[entry]
        while node > 0:
            path.append(node)
            node = int(trie.parent[node])
        path = path[::-1]
        tokens = list(prompt) + [int(trie.token[node]) for node in path]
        logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].double()
        total, above = 0.0, 0
        for step, node in enumerate(path):
            row = logits[len(prompt) - 1 + step]
            allowed = trie.child_nodes[trie.child_offsets[above] : trie.child_offsets[above + 1]]
            pool = (
                row
                if scoring == "full"
                else row[torch.as_tensor(trie.token[allowed].astype(np.int64), device=device)]
            )
            total += float(row[int(trie.token[node])] - pool.logsumexp(-1))
            above = node
        scores.append(total)
    return torch.tensor(scores, dtype=torch.float64)
