"""The network: item embeddings, causal transformer layers, and a softmax over the whole catalogue.

Letters: B sequences, T slots of a sequence, H hidden size, I catalogue entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_LAYERS = 2
NUM_HEADS = 2
"""Both as in the paper's and RecBole's settings."""

INIT_STD = 0.02


class SASRec(nn.Module):
    """SASRec on torch's own transformer layers.

    Slot 0 of every sequence holds a start token, so that a user without a history has a score too. Slot t
    then holds the t-th item of the history, and its state scores the item that comes next. The layers
    normalise before each block, which trains at higher learning rates than the original's order.

    Args:
        num_items: catalogue entries, I. The start token is id I.
        max_history: items that a history can have; longer ones are cut by the caller.
        hidden: size of embeddings and layers, H.
        dropout: of embeddings, attention and layers.
    """

    def __init__(self, num_items: int, max_history: int, hidden: int, dropout: float):
        super().__init__()
        self.num_items = num_items
        self.items = nn.Embedding(num_items + 1, hidden)
        self.slots = nn.Embedding(max_history + 1, hidden)
        self.bias = nn.Parameter(torch.zeros(num_items))
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            hidden, NUM_HEADS, hidden, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, NUM_LAYERS, norm=nn.LayerNorm(hidden), enable_nested_tensor=False
        )
        nn.init.normal_(self.items.weight, std=INIT_STD)
        nn.init.normal_(self.slots.weight, std=INIT_STD)

    def states(self, ids: Tensor) -> Tensor:
        """The state behind every slot, [B, T, H].

        Args:
            ids: Long[B, T], the start token and then items. Shorter histories are padded at their end with
                any id: no slot sees a later one, so padding needs no mask of its own.
        """
        length = ids.shape[1]
        slots = torch.arange(length, device=ids.device)
        later = slots[None, :] > slots[:, None]
        embedded = self.items(ids) + self.slots.weight[:length]
        return self.layers(self.dropout(embedded), mask=later)

    def logits(self, states: Tensor) -> Tensor:
        """Scores of all entries before the softmax, [..., I]; input and output share their embeddings."""
        return states @ self.items.weight[: self.num_items].T + self.bias

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean over the targets of -ln p(target), the softmax running over all entries.

        Args:
            ids: Long[B, T].
            targets: Long[B, T], the item behind each slot; negative where there is none to learn.
        """
        known = targets >= 0
        logits = self.logits(self.states(ids)[known])
        return nn.functional.cross_entropy(logits, targets[known])
