"""What group-DRO remembers between steps: moving averages of group losses, and online weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class DroState:
    """What a run remembers between steps; it is saved with every checkpoint.

    Attributes:
        ema: [G], the sum over earlier steps of b (1-b)^k L.
        ema_weight: [G], the bias correction of `ema`.
        q: [G], the online weights of group_dro.
    """

    num_groups: int
    ema: Tensor = field(default=None)
    ema_weight: Tensor = field(default=None)
    q: Tensor = field(default=None)
    steps: int = 0

    def __post_init__(self):
        zeros = torch.zeros(self.num_groups, dtype=torch.float64)
        if self.ema is None:
            self.ema = zeros.clone()
        if self.ema_weight is None:
            self.ema_weight = zeros.clone()
        if self.q is None:
            self.q = torch.full_like(zeros, 1.0 / self.num_groups)

    def to(self, device) -> DroState:
        """Moves the tensors; returns this state."""
        self.ema = self.ema.to(device)
        self.ema_weight = self.ema_weight.to(device)
        self.q = self.q.to(device)
        return self

    def update_ema(self, losses: Tensor, present: Tensor, rate: float) -> None:
        """Computes L <- (1-b) L + b * batch for the groups present.

        Absent groups keep their average; an absent group is never a loss of 0.
        """
        batch = torch.where(present, losses, 0.0)
        self.ema = torch.where(present, (1 - rate) * self.ema + rate * batch, self.ema)
        self.ema_weight = torch.where(present, (1 - rate) * self.ema_weight + rate, self.ema_weight)

    def ema_losses(self) -> tuple[Tensor, Tensor]:
        """Returns the bias-corrected L[G], and bool[G]: whether the group was ever seen."""
        seen = self.ema_weight > 0
        return torch.where(seen, self.ema / self.ema_weight.clamp_min(1e-300), 0.0), seen

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as CPU tensors, for a checkpoint."""
        return {
            "ema": self.ema.cpu(),
            "ema_weight": self.ema_weight.cpu(),
            "q": self.q.cpu(),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes what `state_dict` returned over, onto this state's device."""
        device = self.q.device
        for name in ("ema", "ema_weight", "q"):
            setattr(self, name, state[name].to(device=device, dtype=torch.float64).clone())
        self.steps = int(state["steps"])
