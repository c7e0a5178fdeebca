"""A few steps of plain training, for tests of what is trained and what stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def five_steps(model: nn.Module, ids: Tensor) -> list[float]:
    """Losses of five AdamW steps on the same tokens, Long[B, T]."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
