"""Group DRO weights: the closed form is the maximiser, its limits are SFT and the worst group, and memory
never invents a loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, rel_entr

from gdrt_ds import dro

LOSSES = torch.tensor([0.7, 3.1, 1.9, 2.6], dtype=torch.float64)
COUNTS = torch.tensor([50.0, 3.0, 20.0, 7.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["token_share", "uniform"])
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_closed_form_is_the_maximiser_that_scipy_finds(kind, tau):
    p = dro.prior(COUNTS, kind)
    q, objective = dro.closed_form_weights(LOSSES, p, tau)

    def value(w):
        return -(w @ LOSSES.numpy() - tau * rel_entr(w, p.numpy()).sum())

    found = minimize(
        value,
        np.full(4, 0.25),
        bounds=[(1e-12, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert np.allclose(q.numpy(), found.x, atol=1e-5)
    assert objective.item() == pytest.approx(-found.fun, abs=1e-8)
    assert objective.item() == pytest.approx(value(q.numpy()) * -1, abs=1e-12)


def test_infinite_tau_with_token_shares_is_sft():
    p = dro.prior(COUNTS, "token_share")
    mean = (COUNTS * LOSSES).sum() / COUNTS.sum()
    q, objective = dro.closed_form_weights(LOSSES, p, float("inf"))
    assert (
        torch.equal(q, torch.softmax(p.log(), 0))
        and torch.allclose(q, COUNTS / COUNTS.sum(), rtol=1e-15)
        and objective.item() == pytest.approx(mean.item(), rel=1e-15)
    )
    for tau in (
        1e3,
        1e8,
        1e14,
    ):  # and the way there: the distance to the mean is var / (2 tau), without cancellation
        q, objective = dro.closed_form_weights(LOSSES, p, tau)
        variance = (p * (LOSSES - mean) ** 2).sum().item()
        assert objective.item() - mean.item() == pytest.approx(variance / (2 * tau), rel=2e-3, abs=2e-15)
        assert torch.allclose(q, p, atol=3 / tau)


def test_tau_to_zero_is_the_worst_group_without_overflow():
    for tau in (1e-2, 1e-8, 1e-300, 5e-324):
        q, objective = dro.closed_form_weights(LOSSES, dro.prior(COUNTS, "token_share"), tau)
        assert torch.allclose(q, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64), atol=1e-15)
        assert objective.item() == pytest.approx(3.1, abs=0.05)
    huge = torch.tensor([1e4, 2e4], dtype=torch.float64)
    q, objective = dro.closed_form_weights(huge, torch.tensor([0.5, 0.5], dtype=torch.float64), 1e-3)
    assert torch.isfinite(q).all() and q[1] == 1 and objective.item() == pytest.approx(2e4)


def test_objective_agrees_with_logsumexp_over_the_whole_range_of_tau():
    p = dro.prior(COUNTS, "token_share")
    for tau in np.geomspace(1e-3, 1e3, 25):
        q, objective = dro.closed_form_weights(LOSSES, p, float(tau))
        exponent = np.log(p.numpy()) + LOSSES.numpy() / tau
        assert objective.item() == pytest.approx(tau * logsumexp(exponent), rel=1e-11)
        assert np.allclose(q.numpy(), np.exp(exponent - logsumexp(exponent)), atol=1e-14)


def test_gradient_of_the_objective_is_q():
    losses = LOSSES.clone().requires_grad_(True)
    p = dro.prior(COUNTS, "uniform")
    (0.7 * torch.logsumexp(p.log() + losses / 0.7, 0)).backward()
    assert torch.allclose(dro.closed_form_weights(LOSSES, p, 0.7)[0], losses.grad, atol=1e-14)


def test_an_absent_group_has_no_weight_and_may_be_nan():
    counts = torch.tensor([4.0, 0.0, 6.0], dtype=torch.float64)
    losses = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    for kind in ("token_share", "uniform"):
        p = dro.prior(counts, kind)
        q, objective = dro.closed_form_weights(losses, p, 0.5)
        assert p[1] == 0 and q[1] == 0 and q.sum().item() == pytest.approx(1) and torch.isfinite(objective)
        some = torch.tensor([0, 2])
        q_some, objective_some = dro.closed_form_weights(losses[some], dro.prior(counts[some], kind), 0.5)
        assert torch.equal(q[some], q_some) and objective == objective_some
    assert torch.equal(dro.prior(counts, "uniform"), torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))


def test_moving_average_is_bias_corrected_and_an_absent_group_keeps_its_own():
    state, rate = dro.DroState(3), 0.25
    always, both = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    state.update_ema(torch.tensor([2.0, 5.0, 0.0], dtype=torch.float64), always, rate)
    losses, seen = state.ema_losses()
    assert losses[:2].tolist() == [2.0, 5.0] and seen.tolist() == [
        True,
        True,
        False,
    ]  # the first value, not a quarter of it
    state.update_ema(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64), both, rate)
    losses, seen = state.ema_losses()
    assert (
        losses[0].item() == pytest.approx((0.75 * 0.25 * 2 + 0.25 * 4) / (0.75 * 0.25 + 0.25))
        and losses[1].item() == 5.0
        and not seen[2]
    )
    for _ in range(200):
        state.update_ema(torch.tensor([3.0, 3.0, 3.0], dtype=torch.float64), torch.tensor([True] * 3), rate)
    assert torch.allclose(state.ema_losses()[0], torch.tensor(3.0, dtype=torch.float64))


def test_state_survives_its_own_dictionary():
    state = dro.DroState(4)
    state.update_ema(LOSSES, COUNTS > 4, 0.1)
    state.q, state.steps = dro.exponentiated_gradient(state.q, LOSSES, COUNTS > 4, 0.3), 7
    other = dro.DroState(4)
    other.load_state_dict(state.state_dict())
    assert (
        all(torch.equal(getattr(state, n), getattr(other, n)) for n in ("ema", "ema_weight", "q"))
        and other.steps == 7
    )


def test_exponentiated_gradient_is_its_formula_and_eta_zero_stands_still():
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    wanted = q * torch.exp(0.5 * LOSSES)
    present = torch.ones(4, dtype=torch.bool)
    assert torch.allclose(
        dro.exponentiated_gradient(q, LOSSES, present, 0.5), wanted / wanted.sum(), atol=1e-15
    )
    assert torch.allclose(dro.exponentiated_gradient(q, LOSSES, present, 0.0), q, atol=1e-15)
    partial = dro.exponentiated_gradient(q, LOSSES, torch.tensor([True, True, False, True]), 0.5)
    grown = torch.where(torch.tensor([True, True, False, True]), wanted, q)
    assert torch.allclose(partial, grown / grown.sum(), atol=1e-15)
    assert torch.isfinite(dro.exponentiated_gradient(q, 1e6 * LOSSES, present, 10.0)).all()
    assert torch.allclose(
        dro.restrict(q, torch.tensor([True, False, True, False])),
        torch.tensor([0.25, 0.0, 0.75, 0.0], dtype=torch.float64),
        atol=1e-15,
    )


def test_cvar_is_the_linear_programme_and_its_limits_are_mean_and_maximum():
    p = dro.prior(COUNTS, "token_share")
    q, objective = dro.cvar_weights(LOSSES, p, 1.0)
    assert torch.allclose(q, p, atol=1e-15) and objective.item() == pytest.approx((p * LOSSES).sum().item())
    q, objective = dro.cvar_weights(LOSSES, p, 1e-9)
    assert q.tolist() == [0.0, 1.0, 0.0, 0.0] and objective.item() == pytest.approx(3.1)
    from scipy.optimize import linprog

    for alpha in (0.05, 0.3, 0.77):
        q, objective = dro.cvar_weights(LOSSES, p, alpha)
        found = linprog(
            -LOSSES.numpy(),
            A_eq=np.ones((1, 4)),
            b_eq=[1],
            bounds=[(0, share / alpha) for share in p.tolist()],
        )
        assert objective.item() == pytest.approx(-found.fun, rel=1e-9) and q.sum().item() == pytest.approx(1)
    tokens = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    assert dro.cvar_weights(tokens, torch.full((5,), 0.2, dtype=torch.float64), 0.4)[
        1
    ].item() == pytest.approx(4.5)


def test_buffer_adds_micro_batches_reports_nonfinite_and_stop_and_keeps_token_slots():
    buffer = dro.StepBuffer(3, "cpu", num_token_slots=4)
    buffer.add(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0]))
    buffer.add(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    buffer.add_tokens(torch.tensor([3, 1]), torch.tensor([0.5, 0.25]))
    buffer.count_tokens(20)
    buffer.count_tokens(7)
    buffer.reduce().wait()
    assert (
        buffer.losses.tolist() == [1.0, 2.0, 0.0]
        and buffer.counts.tolist() == [4, 1, 0]
        and buffer.present.tolist() == [True, True, False]
    )
    assert buffer.token_losses.tolist() == [0, 0.25, 0, 0.5] and buffer.flags() == (False, False)
    assert buffer.tokens.item() == 27 and len(buffer.data) == 3 + 3 + 3 + 4
    buffer.add(torch.tensor([float("nan"), 1.0, float("inf")]), torch.tensor([1.0, 1.0, 1.0]))
    buffer.request_stop()
    assert buffer.flags() == (True, True) and torch.isfinite(buffer.data).all()


def test_the_loss_of_a_group_is_a_mean_also_where_its_token_weights_sum_to_less_than_one():
    buffer = dro.StepBuffer(3, "cpu")
    buffer.add(torch.tensor([0.3, 6.0, 0.0]), torch.tensor([0.1, 2.0, 0.0]))
    assert torch.allclose(buffer.losses, torch.tensor([3.0, 3.0, 0.0], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    "eta, losses, steps",
    [(0.1, [12.0, 2.0], 1000), (0.1, [9.0, 4.0], 2000), (1, [9, 1], 200), (10, [12, 2], 20)],
)
def test_a_group_that_group_dro_has_given_up_has_all_the_weight_where_it_is_alone_and_can_come_back(
    eta, losses, steps
):
    q, both = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([True, True])
    for _ in range(steps):
        q = dro.exponentiated_gradient(q, torch.tensor(losses, dtype=torch.float64), both, eta)
    assert q[0] == 1
    alone = dro.restrict(q, torch.tensor([False, True]))
    assert alone.tolist() == [0.0, 1.0]
    for _ in range(steps):
        q = dro.exponentiated_gradient(q, torch.tensor(losses[::-1], dtype=torch.float64), both, eta)
    assert q[1] > 0.5


def test_weights_over_no_group_are_nothing():
    none = torch.tensor([False, False])
    assert dro.restrict(torch.tensor([0.5, 0.5], dtype=torch.float64), none).tolist() == [0.0, 0.0]
    frozen = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert dro.restrict(frozen, torch.tensor([True, False])).tolist() == [0.0, 0.0]
