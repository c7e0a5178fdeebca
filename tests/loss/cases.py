"""Inputs and checks of the group loss that several tests share. Each check takes the op, so that a wrong
op can be passed in.

Shapes: N tokens, V vocabulary, H hidden, G groups, r LoRA rank.
"""

from __future__ import annotations

import torch

from gdrt_ds.loss import (
    AllowedTokens,
    GroupLoss,
    reference_group_cross_entropy,
    reference_top_k_log_probs,
)


class Case:
    """Seeded inputs of one call, leaves that require grad, and the weights of a backward that uses both
    outputs.
    """

    def __init__(
        self,
        n=37,
        v=101,
        h=16,
        g=5,
        dtype=torch.float32,
        train=False,
        bias=False,
        lora=False,
        allowed=False,
        size=1.0,
        device="cpu",
        **settings,
    ):
        make = torch.Generator().manual_seed(17)

        def normal(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(device)

        self.hidden = (normal(n, h) * size).to(dtype).requires_grad_()
        self.weight = (normal(v, h) * h**-0.5).to(dtype).requires_grad_(train)
        self.labels = torch.randint(v, (n,), generator=make)
        self.groups = torch.randint(max(1, g - 1), (n,), generator=make)  # the last group is absent
        self.num_groups, self.settings = g, dict(settings)
        if bias:
            self.settings["bias"] = normal(v).to(dtype).requires_grad_(train)
        if lora:
            self.settings["lora"] = (
                normal(3, h).to(dtype).requires_grad_(),
                normal(v, 3).to(dtype).requires_grad_(),
                0.25,
            )
        if allowed:
            self._allow(n, v, make)
        self.d_sums, self.d_tokens = normal(g), normal(n)
        self.labels, self.groups = self.labels.to(device), self.groups.to(device)

    def _allow(self, n, v, make):
        sizes = torch.tensor([1, 2, v, 3, v // 2, 1, 7])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        tokens = torch.cat([torch.randperm(v, generator=make)[:size] for size in sizes])
        node = torch.randint(len(sizes), (n,), generator=make)
        pick = (torch.rand(n, generator=make) * sizes[node]).long()
        self.labels = tokens[offsets[node] + pick]
        self.settings["allowed"] = AllowedTokens(node, offsets, tokens)

    @property
    def leaves(self) -> list[torch.Tensor]:
        tensors = [
            self.hidden,
            self.weight,
            self.settings.get("bias"),
            *(self.settings.get("lora") or ())[:2],
        ]
        return [t for t in tensors if t is not None and t.requires_grad]

    def call(self, op, **more) -> GroupLoss:
        return GroupLoss(
            *op(
                self.hidden,
                self.weight,
                self.labels,
                self.groups,
                self.num_groups,
                **{**self.settings, **more},
            )
        )

    def run(self, op, **more) -> list[torch.Tensor]:
        """[loss_sums, token_losses, gradient of each leaf] for the objective sum(d_sums * loss_sums) +
        sum(d_tokens * token_losses).
        """
        out = self.call(op, **more)
        objective = (out.loss_sums.double() * self.d_sums).sum() + (
            out.token_losses.double() * self.d_tokens
        ).sum()
        return [
            out.loss_sums.detach(),
            out.token_losses.detach(),
            *torch.autograd.grad(objective, self.leaves),
        ]


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm-relative difference; infinite where exactly one side is finite."""
    value, truth = value.double(), truth.double()
    if not torch.equal(value.isfinite(), truth.isfinite()):
        return float("inf")
    value, truth = value.nan_to_num(0, 0, 0), truth.nan_to_num(0, 0, 0)
    return ((value - truth).norm() / truth.norm().clamp_min(1e-12)).item()


def check_exact(op, **settings) -> None:
    """In float64 the op agrees with the reference to 1e-12: sums, token losses and every gradient."""
    case = Case(dtype=torch.float64, **settings)
    for value, truth in zip(case.run(op), case.run(reference_group_cross_entropy)):
        assert distance(value, truth) < 1e-12


def check_no_worse_than_plain(op, dtype, **settings) -> None:
    """|op - float64| <= 1.25 x |plain cross-entropy in the same dtype - float64| + a few roundings, for
    every output (form of CCE's tests).

    1.25 because both are roundings of the same size: which one is nearer in a given sample is luck.
    """
    case = Case(dtype=dtype, **settings)
    truths = case.run(reference_group_cross_entropy)
    plains = case.run(reference_group_cross_entropy, dtype=None)
    for value, plain, truth in zip(case.run(op), plains, truths):
        # A few roundings: sgemm sums a handful of rows in another order than many, which alone makes 1e-6 at
        # V = 4,099.
        allowance = 1.5e-6 if dtype == torch.float32 else 2e-3
        assert distance(value, truth) <= 1.25 * distance(plain, truth) + allowance


def check_sums_are_sums_of_token_losses(op) -> None:
    """loss_sums[g] is the sum, not the mean, over exactly the tokens of g.

    An absent group is 0 and receives no gradient.
    """
    case = Case(n=50, g=4)
    out = case.call(op)
    for group in range(4):
        assert (
            abs(out.loss_sums[group].item() - out.token_losses[case.groups == group].double().sum().item())
            < 1e-4
        )
    assert out.loss_sums[3] == 0 and not (case.groups == 3).any()
    (gradient,) = torch.autograd.grad(out.loss_sums[3] * 7.0, [case.hidden])
    assert gradient.abs().max() == 0


def check_gradients_add_up(op) -> None:
    """A row's gradient: (d loss_sums of its group + d its token loss) times the gradient of its loss."""
    case = Case(n=24, dtype=torch.float64)
    rows = torch.autograd.grad(case.call(reference_group_cross_entropy).token_losses.sum(), [case.hidden])[0]
    gradient = case.run(op)[2]
    assert distance(gradient, rows * (case.d_sums[case.groups] + case.d_tokens).view(-1, 1)) < 1e-12


def check_top_k(op, dtype, tolerance: float, **settings) -> None:
    """The K-th log-probability is that of a full sort in float64, whatever K; losses and gradients stay the
    same to the bit."""
    case = Case(dtype=dtype, **settings)
    plain = case.run(op)
    for k in (1, 2, 10, 500):
        out = case.call(op, top_k=k)
        truth = reference_top_k_log_probs(case.hidden, case.weight, k, **case.settings)
        assert not out.top_k_log_probs.requires_grad
        assert torch.allclose(out.top_k_log_probs.double(), truth, rtol=tolerance, atol=tolerance), k
        for value, same in zip(case.run(op, top_k=k), plain, strict=True):
            assert torch.equal(value, same)
    if not len(case.hidden):
        return
    # Rank 1 is the largest: a label of that rank has exactly this log-probability.
    best = case.call(op, top_k=1).top_k_log_probs
    assert (best >= -case.call(op).token_losses.detach() - tolerance).all()
