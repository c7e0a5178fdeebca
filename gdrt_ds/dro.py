"""Group distributionally robust optimisation: group losses of a global batch in, weights on the simplex out.

One packed float64 all-reduce per optimizer step carries everything that ranks must agree on (`StepBuffer`); weights are
computed from the reduced buffer only, by the same float64 operations on every rank, so they are bitwise equal.

Notation (method.md): G groups, S[G] loss sums, n[G] token counts, L = S / n, p prior, q weights, tau temperature.
Weighting and measuring are separate: `StepBuffer` measures, the functions weigh, `DroState` remembers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

CONTROL_SLOTS = ("nonfinite", "stop")


def prior(counts: Tensor, kind: str) -> Tensor:
    """p over the groups present: token share of this global batch, or uniform. counts: [G] -> float64[G], sums to 1."""
    present = counts > 0
    weights = counts.double() if kind == "token_share" else present.double()
    return weights / weights.sum().clamp_min(1e-300)


def closed_form_weights(losses: Tensor, p: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """argmax_q sum q L - tau KL(q || p) = p exp(L / tau) / Z, and its value tau log sum p exp(L / tau).

    Args:
        losses: float64[G]; entries of groups with p = 0 are ignored (they may be NaN).
        p: float64[G] on the simplex over the groups present.
        tau: > 0; infinity is the plain mean under p.
    Returns:
        (q float64[G], objective float64[]). Exact for any tau > 0: the largest loss is subtracted before anything else.
    """
    kept = torch.where(p > 0, losses, -torch.inf)
    worst = kept.max()
    below = torch.where(p > 0, (kept - worst) / tau, -torch.inf)      # <= 0, whatever tau
    q = torch.softmax(p.clamp_min(1e-300).log() + below, 0)
    if tau == float("inf"):
        return q, (p * torch.where(p > 0, losses, 0.0)).sum()
    # log1p of expm1: at large tau the sum is 1 - L/tau and log would leave nothing of it
    return q, worst + tau * (p * below.expm1()).sum().log1p()


def exponentiated_gradient(q: Tensor, losses: Tensor, present: Tensor, eta: float) -> Tensor:
    """Online Group DRO (Sagawa et al. 2020): q <- q exp(eta L), renormalised; groups that are absent keep their factor."""
    exponent = q.clamp_min(1e-300).log() + eta * torch.where(present, losses, 0.0)
    return torch.softmax(exponent, 0)


def restrict(q: Tensor, present: Tensor) -> Tensor:
    """q over the groups present, renormalised: an absent group has no term."""
    kept = torch.where(present, q, 0.0)
    return kept / kept.sum().clamp_min(1e-300)


def cvar_weights(losses: Tensor, p: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Worst `alpha` share of the mass p: max_q sum q L with 0 <= q <= p / alpha. Works for groups and for single tokens.

    Returns:
        (q, objective). alpha = 1 is the plain mean.
    """
    order = torch.argsort(torch.where(p > 0, losses, -torch.inf), descending=True, stable=True)
    mass = (p[order] / alpha)
    room = (1.0 - (mass.cumsum(0) - mass)).clamp_min(0.0)
    q = torch.zeros_like(p)
    q[order] = torch.minimum(mass, room)
    return q, (q * torch.where(p > 0, losses, 0.0)).sum()


@dataclass
class DroState:
    """What a run remembers between steps; saved with every checkpoint.

    ema holds sum of b (1-b)^k L and ema_weight its bias correction, per group; q is the online weight of group_dro.
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

    def to(self, device) -> "DroState":
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
        return {"ema": self.ema.cpu(), "ema_weight": self.ema_weight.cpu(), "q": self.q.cpu(),
                "steps": torch.tensor(self.steps, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.q.device
        for name in ("ema", "ema_weight", "q"):
            setattr(self, name, state[name].to(device=device, dtype=torch.float64).clone())
        self.steps = int(state["steps"])


class StepBuffer:
    """The one packed all-reduce of an optimizer step: [S (G) | n (G) | control slots | optional token losses].

    Every rank adds what it measured and takes part, also with no tokens at all; the sum is all that anybody reads.
    """

    def __init__(self, num_groups: int, device, num_token_slots: int = 0):
        self.num_groups = num_groups
        self.data = torch.zeros(2 * num_groups + len(CONTROL_SLOTS) + num_token_slots, dtype=torch.float64, device=device)
        self._work = None

    def add(self, loss_sums: Tensor, counts: Tensor) -> None:
        """Adds one micro-batch: loss_sums [G] (detached here), counts [G]."""
        groups = self.num_groups
        sums = loss_sums.detach().to(self.data)
        self.data[:groups] += torch.nan_to_num(sums, 0.0, 0.0, 0.0)
        self.data[groups:2 * groups] += counts.to(self.data)
        self.data[2 * groups] += (~torch.isfinite(sums)).any().to(self.data)

    def add_tokens(self, slots: Tensor, token_losses: Tensor) -> None:
        """Puts single token losses into their slot of the global batch (token-level CVaR)."""
        start = 2 * self.num_groups + len(CONTROL_SLOTS)
        self.data[start + slots] = token_losses.detach().to(self.data)

    def request_stop(self) -> None:
        self.data[2 * self.num_groups + 1] += 1

    def reduce(self, async_op: bool = False) -> "StepBuffer":
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self.data, op=dist.ReduceOp.SUM, async_op=async_op)
        return self

    def wait(self) -> "StepBuffer":
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self

    @property
    def loss_sums(self) -> Tensor:
        return self.data[:self.num_groups]

    @property
    def counts(self) -> Tensor:
        return self.data[self.num_groups:2 * self.num_groups]

    @property
    def losses(self) -> Tensor:
        """L[G]; absent groups are 0 here and must be masked by `present`."""
        return self.loss_sums / self.counts.clamp_min(1)

    @property
    def present(self) -> Tensor:
        return self.counts > 0

    @property
    def token_losses(self) -> Tensor:
        return self.data[2 * self.num_groups + len(CONTROL_SLOTS):]

    def flags(self) -> tuple[bool, bool]:
        """(non-finite seen on some rank, stop requested on some rank). The step's one host synchronisation."""
        nonfinite, stop = self.data[2 * self.num_groups:2 * self.num_groups + 2].tolist()
        return nonfinite > 0, stop > 0


def assert_equal_on_all_ranks(value: Tensor, name: str) -> None:
    """Debug mode: proves that `value` is bitwise equal on every rank (extra collectives)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    bits = value.detach().double().contiguous().view(torch.int64)
    low, high = bits.clone(), bits.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(f"{name} differs between ranks: this must never happen; please report it with the run's config.yaml")
