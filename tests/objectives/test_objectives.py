"""Every objective equals its formula, written down again here, and becomes SFT in its limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gdrt_ds import dro
from gdrt_ds.config import DroSection, ObjectiveOptions, RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.objectives import GroupView, Objective, TokenTable, TokenView, get_objective, objectives
from gdrt_ds.training.step import StepRunner

G, N = 4, 40
RNG = np.random.default_rng(2)
LOSS = RNG.uniform(0.05, 8.0, N)
GROUP = RNG.integers(0, G - 1, N)  # the last group is absent
POSITION, LENGTH = np.arange(N) % 4, np.full(N, 4)


def group_view(values, weights=None, section=None, state=None, frozen=None) -> GroupView:
    weights = np.ones(N) if weights is None else weights
    counts = np.array([weights[GROUP == g].sum() for g in range(G)])
    sums = np.array([(weights * values)[GROUP == g].sum() for g in range(G)])
    losses = torch.from_numpy(np.divide(sums, counts, out=np.zeros(G), where=counts > 0))
    return GroupView(
        losses, torch.from_numpy(counts), state or dro.DroState(G), section or DroSection(), frozen
    )


def value_of(name: str, section=None, **options) -> float:
    """F of an objective on the hand-made batch through its own pieces.

    Token term, token weights, aggregation.
    """
    objective, section = get_objective(name), section or DroSection()
    options = ObjectiveOptions(**options)
    values = LOSS
    if objective.token_term is not None:
        view = TokenView(
            torch.from_numpy(LOSS),
            torch.from_numpy(POSITION),
            torch.from_numpy(LENGTH),
            options,
            torch.from_numpy(LOSS[::-1].copy()),
        )
        values = objective.token_term(view).numpy()
    weights = None
    if objective.token_weights is not None:
        weights = objective.token_weights(table(options))
    if objective.per_token(section):
        view = GroupView(
            torch.from_numpy(values), torch.ones(N, dtype=torch.float64), dro.DroState(G), section
        )
        q, objective_value = objective.aggregate(view)
        assert q.sum().item() == pytest.approx(1)
        return float(objective_value)
    view = group_view(values, weights, section)
    q, objective_value = objective.aggregate(view)
    assert q[G - 1] == 0 and q.sum().item() == pytest.approx(1)
    if objective.aggregate is not get_objective("gdrt").aggregate:
        assert float(objective_value) == pytest.approx(float((q * view.losses).sum()), rel=1e-12)
    return float(objective_value)


def table(options) -> TokenTable:
    return TokenTable(
        counts=np.ones(N, dtype=np.int64),
        train_count=np.arange(N) // 4 + 1,
        branching=np.arange(N) % 3 == 0,
        valid_before=np.full(N, 5),
        valid_after=np.full(N, 3),
        options=options,
    )


MEAN = LOSS.mean()


def test_sft_is_the_token_mean():
    assert value_of("sft") == pytest.approx(MEAN, rel=1e-12)


def test_gdrt_is_tau_log_mean_exp_of_the_groups_present():
    share = np.array([(GROUP == g).mean() for g in range(G - 1)])
    losses = np.array([LOSS[GROUP == g].mean() for g in range(G - 1)])
    for tau in (0.1, 1.0, 10.0):
        assert value_of("gdrt", DroSection(tau=tau)) == pytest.approx(
            tau * np.log((share * np.exp(losses / tau)).sum()), rel=1e-10
        )
        uniform = DroSection(tau=tau, prior="uniform")
        assert value_of("gdrt", uniform) == pytest.approx(
            tau * np.log(np.exp(losses / tau).mean()), rel=1e-10
        )
        assert value_of("gdrt+msl", DroSection(tau=tau)) == value_of("gdrt", DroSection(tau=tau))
    assert value_of("gdrt", DroSection(tau=float("inf"))) == pytest.approx(MEAN, rel=1e-12)
    assert value_of("gdrt", DroSection(tau=1e-12)) == pytest.approx(losses.max(), rel=1e-9)


def test_gdrt_with_frozen_weights_ignores_the_losses():
    frozen = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    q, _ = get_objective("gdrt").aggregate(group_view(LOSS, frozen=frozen))
    assert torch.allclose(q, torch.tensor([1 / 6, 2 / 6, 3 / 6, 0.0], dtype=torch.float64), atol=1e-15)
    q_before, value = get_objective("gdrt").aggregate(
        GroupView(None, torch.tensor([3.0, 1.0, 1.0, 0.0]), dro.DroState(G), DroSection(), frozen)
    )
    assert torch.equal(q_before, q) and value is None


def test_group_dro_is_the_exponentiated_gradient_and_learns_after_the_step():
    objective, state, section = get_objective("group_dro"), dro.DroState(G), DroSection(eta=0.5)
    view = group_view(LOSS, section=section, state=state)
    losses = np.array([LOSS[GROUP == g].mean() for g in range(G - 1)])
    wanted = np.exp(0.5 * losses) / np.exp(0.5 * losses).sum()
    q, value = objective.aggregate(view)
    assert np.allclose(q[:3].numpy(), wanted, atol=1e-14) and value.item() == pytest.approx(
        (wanted * losses).sum()
    )
    assert torch.equal(
        state.q, torch.full((G,), 0.25, dtype=torch.float64)
    )  # weighing changes nothing, only remember does
    objective.remember(view)
    assert np.allclose((state.q[:3] / state.q[:3].sum()).numpy(), wanted, atol=1e-14)
    late = group_view(LOSS, section=DroSection(eta=0.5, estimate="ema"), state=state)
    assert torch.allclose(objective.aggregate(late)[0], q, atol=1e-14)


def test_group_dro_with_a_vanishing_step_is_the_mean_over_groups_and_sft_for_equal_groups():
    objective = get_objective("group_dro")
    losses = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    view = GroupView(
        losses, torch.full((4,), 10.0, dtype=torch.float64), dro.DroState(4), DroSection(eta=1e-300)
    )
    q, value = objective.aggregate(view)
    assert torch.allclose(
        q, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-15
    ) and value.item() == pytest.approx(get_objective("sft").aggregate(view)[1].item())


def test_cvar_is_the_mean_of_the_worst_share_and_alpha_one_is_sft():
    ordered = np.sort(LOSS)[::-1]
    assert value_of("cvar", DroSection(alpha=0.25)) == pytest.approx(ordered[:10].mean())
    assert value_of("cvar", DroSection(alpha=0.26)) == pytest.approx(
        (ordered[:10].sum() + 0.4 * ordered[10]) / 10.4
    )
    assert value_of("cvar", DroSection(alpha=1.0)) == pytest.approx(MEAN)
    assert value_of("cvar", DroSection(alpha=1.0, cvar_over="groups")) == pytest.approx(MEAN)
    assert value_of("cvar", DroSection(alpha=1e-6, cvar_over="groups")) == pytest.approx(
        max(LOSS[GROUP == g].mean() for g in range(G - 1))
    )


def test_focal_weighs_by_one_minus_probability_and_gamma_zero_is_sft():
    assert value_of("focal", focal_gamma=2.0) == pytest.approx(
        ((1 - np.exp(-LOSS)) ** 2 * LOSS).mean(), rel=1e-12
    )
    assert value_of("focal", focal_gamma=0.0) == pytest.approx(MEAN, rel=1e-12)
    losses = torch.tensor([0.0, 1e-8, 3.0, 80.0], dtype=torch.float64, requires_grad=True)
    view = TokenView(losses, torch.zeros(4), torch.ones(4), ObjectiveOptions(focal_gamma=2.0))
    get_objective("focal").token_term(view).sum().backward()
    assert torch.isfinite(losses.grad).all() and losses.grad[3].item() == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [0.01, 0.5, 0.99])
def test_focal_below_gamma_one_has_the_slope_of_its_formula_also_at_a_loss_of_zero(gamma):
    losses = torch.tensor([0.0, -1e-8, 1e-45, 1e-30, 1e-6, 0.7, 60.0], requires_grad=True)
    view = TokenView(losses, torch.zeros(7), torch.ones(7), ObjectiveOptions(focal_gamma=gamma))
    values = get_objective("focal").token_term(view)
    values.sum().backward()
    loss = losses.detach().double().numpy()[3:]
    missing = -np.expm1(-loss)
    assert np.allclose(values.detach().numpy()[3:], missing**gamma * loss, rtol=1e-5, atol=1e-40)
    slope = gamma * missing ** (gamma - 1) * np.exp(-loss) * loss + missing**gamma
    assert np.allclose(losses.grad.numpy()[3:], slope, rtol=1e-5, atol=0)
    # The limit at 0, where losses below the smallest normal number count as 0.
    assert values[:3].tolist() == losses.grad[:3].tolist() == [0.0, 0.0, 0.0]


def test_cft_adds_the_counterfactual_term_and_alpha_zero_is_sft():
    weight = 1 + (0.5 - 1) * POSITION / 3
    assert value_of("cft", cft_alpha=0.3, cft_beta=0.5) == pytest.approx(
        (LOSS + 0.3 * weight * LOSS[::-1]).mean(), rel=1e-6
    )
    assert value_of("cft", cft_alpha=0.0) == pytest.approx(MEAN, rel=1e-12)


def test_igd_lowers_determined_tokens_and_beta_one_is_sft():
    weight = np.where(np.arange(N) % 3 == 0, 1.0, 0.1)
    assert value_of("igd", igd_beta=0.1) == pytest.approx((weight * LOSS).sum() / weight.sum(), rel=1e-12)
    assert value_of("igd", igd_beta=1.0) == pytest.approx(MEAN, rel=1e-12)


def test_reweight_is_inverse_popularity_and_power_zero_is_sft():
    weight = (np.arange(N) // 4 + 1.0) ** -0.5
    assert value_of("reweight", reweight_power=0.5) == pytest.approx(
        (weight * LOSS).sum() / weight.sum(), rel=1e-12
    )
    assert value_of("reweight", reweight_power=0.0) == pytest.approx(MEAN, rel=1e-12)


def bear_weights(losses, kth, choices, **options) -> np.ndarray:
    view = TokenView(
        torch.as_tensor(losses, dtype=torch.float64),
        torch.zeros(len(losses)),
        torch.ones(len(losses)),
        ObjectiveOptions(**options),
        top_k_log_probs=torch.as_tensor(kth, dtype=torch.float64),
        num_choices=torch.as_tensor(choices),
    )
    return get_objective("bear").live_weights(view).numpy()


def test_bear_weighs_by_the_distance_to_the_kth_token_and_lambda_zero_is_msl():
    losses, kth, choices = LOSS, -LOSS[::-1] + 0.3, np.where(np.arange(N) % 5 == 0, 1, 7)
    margin = -losses - kth
    for lam, xi in ((0.25, 2.75), (4.0, 0.1)):
        wanted = np.where(choices > 1, 1 + lam / (1 + np.exp(-margin / xi)), 0.0)
        found = bear_weights(losses, kth, choices, bear_lambda=lam, bear_xi=xi)
        assert np.allclose(found, wanted, atol=1e-14)
        opposite = bear_weights(losses, kth, choices, bear_lambda=lam, bear_xi=xi, bear_favours="at_risk")
        # Both signs together give each token 2 + lambda: sigmoid(m) + sigmoid(-m) = 1.
        assert np.allclose((found + opposite)[choices > 1], 2 + lam, atol=1e-12)
        q, value = get_objective("bear").aggregate(group_view(losses, found))
        assert float(value) == pytest.approx((wanted * losses).sum() / wanted.sum(), rel=1e-12)
    assert np.array_equal(bear_weights(losses, kth, choices, bear_lambda=0.0), choices > 1)


def test_bear_favours_tokens_that_the_beam_keeps_unless_it_is_told_otherwise():
    kept, dropped = bear_weights([0.1, 5.0], [-2.0, -2.0], [9, 9])
    assert 1 < dropped < kept < 1.25
    kept, dropped = bear_weights([0.1, 5.0], [-2.0, -2.0], [9, 9], bear_favours="at_risk")
    assert 1 < kept < dropped < 1.25


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_sft_go_is_the_mean_plus_lambda_times_the_worst_group_and_lambda_zero_is_sft(weight):
    objective = get_objective("sft_go")
    view = group_view(LOSS, section=DroSection(worst_weight=weight))
    losses = torch.tensor(LOSS, requires_grad=True)  # plain torch, float64, with autograd's own gradient
    means = torch.stack([losses[torch.from_numpy(GROUP == g)].mean() for g in range(G - 1)])
    truth = losses.mean() + weight * means.max()
    truth.backward()
    q, value = objective.aggregate(view)
    assert value.item() == pytest.approx(truth.item(), rel=1e-12)
    assert q.sum().item() == pytest.approx(1 + weight) and q[G - 1] == 0
    per_token = (q / view.counts.clamp_min(1))[torch.from_numpy(GROUP)]
    assert torch.allclose(per_token, losses.grad, atol=1e-15)
    if weight == 0:
        assert value.item() == pytest.approx(MEAN, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "prior", "wanted"),
    [
        ("sft_go", "token_share", [0.2, 0.2, 0.6, 0.0]),
        ("sft_go", "uniform", [0.2, 0.2, 0.6, 0.0]),
        ("gdrt", "token_share", [0.2, 0.2, 0.6, 0.0]),
        ("gdrt", "uniform", [1 / 3, 1 / 3, 1 / 3, 0.0]),
    ],
)
def test_with_moving_averages_the_first_step_of_sft_go_is_plain_sft_and_of_gdrt_its_prior(
    name, prior, wanted
):
    config = RunConfig(objective=name, dro=DroSection(estimate="ema", prior=prior))
    nothing = dict(
        engine=None, plan=None, tokens=None, runtime=None, packing="none", prefix_length=0, pad_id=0
    )
    runner = StepRunner(objective=get_objective(name), config=config, state=dro.DroState(G), **nothing)
    q = runner._early_weights(torch.tensor([1.0, 1.0, 3.0, 0.0], dtype=torch.float64))
    assert torch.allclose(q, torch.tensor(wanted, dtype=torch.float64), atol=1e-15)


def test_an_absent_group_is_never_the_worst_of_sft_go():
    losses = torch.tensor([-2.0, -1.0, 0.0], dtype=torch.float64)  # excess losses may be below the absent 0
    counts = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    view = GroupView(losses, counts, dro.DroState(3), DroSection(worst_weight=1.0))
    q, value = get_objective("sft_go").aggregate(view)
    assert torch.allclose(q, torch.tensor([0.75, 1.25, 0.0], dtype=torch.float64))
    assert value.item() == pytest.approx(-2.75)


CHANGED = {
    "dro.tau": 0.3,
    "dro.prior": "uniform",
    "dro.eta": 3.0,
    "dro.alpha": 0.1,
    "dro.cvar_over": "groups",
    "dro.worst_weight": 2.0,
    "options.focal_gamma": 5.0,
    "options.cft_alpha": 0.7,
    "options.cft_beta": 0.9,
    "options.igd_beta": 0.5,
    "options.reweight_power": 0.3,
    "options.msl_temperature": 0.2,
    "options.bear_lambda": 0.7,
    "options.bear_xi": 1.5,
    "options.bear_k": 3,
    "options.bear_favours": "at_risk",
}


@pytest.mark.parametrize("name", sorted(n for n, one in objectives().items() if one.settings is not None))
@pytest.mark.parametrize("setting", CHANGED)
def test_an_objective_reads_the_settings_that_it_says_and_no_other(name, setting):
    objective = get_objective(name)
    section, _, field = setting.partition(".")
    given = {field: CHANGED[setting]}

    def figures(changed) -> list:
        options = ObjectiveOptions(**changed if section == "options" else {})
        parts = [objective.top_k(options) if objective.top_k else None]
        parts.append(options.msl_temperature if objective.masked_softmax else None)  # read by the step
        if objective.live_weights is not None:
            kth, choices = np.linspace(-3, 0, N), np.arange(N) % 9
            return [*parts, *bear_weights(LOSS, kth, choices, **options.model_dump()).tolist()]
        # Groups as the worst share: the prior of single tokens is the same whatever it is.
        base = {"cvar_over": "groups"} if name == "cvar" and field != "cvar_over" else {}
        of_groups = DroSection(**base, **changed if section == "dro" else {})
        if name == "sft_go":  # its weights sum to 1 + lambda, which `value_of` refuses
            return [*parts, float(objective.aggregate(group_view(LOSS, section=of_groups))[1])]
        return [*parts, value_of(name, of_groups, **options.model_dump())]

    assert (figures(given) != figures({})) == (setting in objective.settings)


def test_every_setting_of_an_objective_is_one_that_the_test_above_changes():
    assert {setting for one in objectives().values() for setting in one.settings or ()} == set(CHANGED)


def test_only_objectives_that_look_at_this_batch_need_a_first_pass():
    late = {name for name, objective in objectives().items() if objective.is_late(DroSection())}
    assert late == {"gdrt", "gdrt+msl", "group_dro", "cvar", "sft_go", "bear"}
    assert {n for n, o in objectives().items() if o.is_late(DroSection(estimate="ema"))} == {
        "cvar",
        "bear",
    }
    assert not get_objective("gdrt").is_late(DroSection(frozen_weights=[0.5, 0.5]))
    assert {n for n, o in objectives().items() if o.masked_softmax} == {"msl", "gdrt+msl", "bear"}


def test_an_objective_of_your_own_package_is_found_and_a_typo_gets_the_nearest_name():
    assert set(objectives()) == {
        "sft",
        "gdrt",
        "group_dro",
        "cvar",
        "focal",
        "msl",
        "gdrt+msl",
        "cft",
        "igd",
        "reweight",
        "sft_go",
        "bear",
    }
    assert get_objective("gdrt_ds.objectives.sft:OBJECTIVE") is get_objective("sft")
    with pytest.raises(UserError, match="did you mean `gdrt`"):
        get_objective("grdt")
    with pytest.raises(UserError, match="cannot be imported"):
        get_objective("no_such_module:X")
    with pytest.raises(UserError, match="is a function, not"):
        get_objective("gdrt_ds.objectives:get_objective")
    assert all(isinstance(o, Objective) and o.source and o.formula for o in objectives().values())
