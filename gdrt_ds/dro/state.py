"""What group-DRO remembers between steps.

Moving averages of the group losses, and the online weights of group_dro.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DroState:
    """What a run remembers between steps; saved with every checkpoint.

    ema holds sum of b (1-b)^k L and ema_weight its bias correction, per group; q is the online weight of
    group_dro.
    """

    num_groups: int
    ema: Tensor = field(default=None)
    ema_weight: Tensor = field(default=None)
    q: Tensor = field(default=None)
    steps: int = 0

    def __post_init__(self):
        zeros = torch.zeros(self.num_groups, dtype=torch.float64)
        self.ema = zeros.clone() if self.ema is None else self.ema
        self.ema_weight = zeros.clone() if self.ema_weight is None else self.ema_weight
        self.q = torch.full_like(zeros, 1.0 / self.num_groups) if self.q is None else self.q

    def to(self, device) -> DroState:
        self.ema, self.ema_weight, self.q = self.ema.to(device), self.ema_weight.to(device), self.q.to(device)
        return self

    def update_ema(self, losses: Tensor, present: Tensor, rate: float) -> None:
        """L <- (1-b) L + b * batch for groups present, unchanged for absent ones (never "loss 0")."""
        batch = torch.where(present, losses, 0.0)
        self.ema = torch.where(present, (1 - rate) * self.ema + rate * batch, self.ema)
        self.ema_weight = torch.where(present, (1 - rate) * self.ema_weight + rate, self.ema_weight)

    def ema_losses(self) -> tuple[Tensor, Tensor]:
        """(bias-corrected L[G], seen bool[G])."""
        seen = self.ema_weight > 0
        return torch.where(seen, self.ema / self.ema_weight.clamp_min(1e-300), 0.0), seen

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "ema": self.ema.cpu(),
            "ema_weight": self.ema_weight.cpu(),
            "q": self.q.cpu(),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.q.device
        for name in ("ema", "ema_weight", "q"):
            setattr(self, name, state[name].to(device=device, dtype=torch.float64).clone())
        self.steps = int(state["steps"])
