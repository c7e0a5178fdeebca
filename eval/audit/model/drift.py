"""Audit `drift`: does training move the prediction from the history to the prompt, or back?

It follows three figures along the run's checkpoints; step 0 is the base model:

- the target's NLL over the catalogue, behind the true history;
- history sensitivity, NLL(swapped history) - NLL(true history), as the audit `sensitivity` has it;
- log2 of auxiliary:interaction attribution, as the audit `language` has it.

The effect is the change of the last figure from the first checkpoint to the last, paired over users: above 0,
what is no user's weighs more and more. The base model is no fair start, because it does not know the task.
With a single checkpoint the change is from the base. Control: the two ends are swapped at random within
users, and the change must vanish. Keep checkpoints with train.save_every and train.keep_checkpoints.

Shapes: U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.audit.attribution import AUXILIARY, INTERACTION, Ablations, Attribution
from eval.audit.base import Audit, Cost, result
from eval.audit.checkpoint_steps import chosen_steps, lacks_checkpoints, walk
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap, permutation_p
from eval.audit.model.language import TINY, token_means
from eval.audit.model.sensitivity import SWAPPED, variant_prompts
from eval.audit.partners import partner_note
from eval.audit.target_loss import rows_of
from gdrt_ds.data.corpus import Sample

DEFAULT_USERS = 32
MOST_STEPS = 10
PASSES = Ablations.ROWS + 1  # of the attribution, the first of which has the true history, and another user's
PERMUTATIONS = 200
SCORING = "full"
NLL, SENSITIVITY, LOG_RATIO = "target NLL", "history sensitivity", "log2 auxiliary:interaction"


@dataclass(frozen=True)
class Step:
    """What one step of training shows, per user [U].

    Attributes:
        nll: of the target over the catalogue, nats.
        swapped: nats that another user's history costs.
        auxiliary, interaction: sums of |attribution| over the target's tokens, nats.
    """

    nll: np.ndarray
    swapped: np.ndarray
    auxiliary: np.ndarray
    interaction: np.ndarray

    @classmethod
    def of(cls, true: np.ndarray, swapped: np.ndarray, found: list[Attribution]) -> Step:
        """Arguments: NLL [U] behind the true and behind another user's history; attributions."""
        sums, _, _ = token_means(found)
        auxiliary = sums[:, list(AUXILIARY)].sum(axis=1)
        return cls(true, swapped - true, auxiliary, sums[:, INTERACTION])


def log_ratio(rows: np.ndarray) -> float:
    """log2 of summed auxiliary over summed interaction attribution, rows [U, 2]."""
    auxiliary, interaction = rows.sum(axis=0) + TINY
    return float(np.log2(auxiliary / interaction))


def ends(first: Step, last: Step) -> np.ndarray:
    """[U, 4]: auxiliary and interaction of the first step, then of the last."""
    return np.stack([first.auxiliary, first.interaction, last.auxiliary, last.interaction], axis=1)


def change_of(rows: np.ndarray) -> float:
    """Change of the log2 ratio, of the rows of `ends`."""
    return log_ratio(rows[:, 2:]) - log_ratio(rows[:, :2])


def permuted_changes(rows: np.ndarray, seed: int) -> np.ndarray:
    """Changes where each user's two ends are swapped by a coin, [PERMUTATIONS]."""
    rng = np.random.default_rng([seed, 7])
    swapped = rows[:, [2, 3, 0, 1]]
    coins = rng.integers(0, 2, size=(PERMUTATIONS, len(rows)), dtype=bool)
    return np.array([change_of(np.where(coin[:, None], swapped, rows)) for coin in coins])


def figures_of(step: Step, num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """The three figures of one step with their intervals over users."""
    settings = {"num": num_bootstrap, "seed": seed}
    rows = np.stack([step.auxiliary, step.interaction], axis=1)
    return {
        NLL: bootstrap(step.nll, null=None, **settings),
        SENSITIVITY: bootstrap(step.swapped, **settings),
        LOG_RATIO: bootstrap(rows, log_ratio, **settings),
    }


def measure_step(context: AuditContext, samples: list[Sample], name: str) -> Step:
    """Reads every target behind its own and another history, and behind each ablation of its own.

    All in one pass over the rows: another user's history is that user's own prompt, which is read once.
    """
    ablations = Ablations.of(context, samples)
    swapped = rows_of(context, variant_prompts(context, samples)[SWAPPED], context.targets(samples))
    rows = [*ablations.rows, *swapped]
    labels = [*ablations.labels, *(target for _, target in swapped)]
    losses = context.losses(rows, f"histories and ablations at {name}", labels)
    of_ablations, of_swapped = losses[: len(ablations.rows)], losses[len(ablations.rows) :]
    nll = [
        np.array([one["renormalised"].sum() for one in part])
        for part in (of_ablations[:: Ablations.ROWS], of_swapped)
    ]
    return Step.of(*nll, ablations.read(of_ablations, SCORING))


def run(context: AuditContext) -> dict:
    options = context.options
    samples = context.users(DEFAULT_USERS)
    steps = {
        step: measure_step(at_step, samples, f"step {step}") for step, at_step in walk(context, MOST_STEPS)
    }
    numbers = sorted(steps)
    first = numbers[1] if len(numbers) > 2 else numbers[0]
    last = numbers[-1]
    rows = ends(steps[first], steps[last])
    effect = bootstrap(rows, change_of, num=options.num_bootstrap, seed=options.seed)
    null = permuted_changes(rows, options.seed)
    p = permutation_p(abs(effect.value), np.abs(null))
    estimates = {
        step: figures_of(found, options.num_bootstrap, options.seed) for step, found in steps.items()
    }
    start, end = estimates[first], estimates[last]
    shown = "" if p <= 0.05 else ", not shown"
    finding = (
        f"From step {first} to step {last} log2 of auxiliary:interaction attribution changes by "
        f"{effect.text()} (p = {p:.2g}{shown}; {effect.n} users); another user's history costs "
        f"{start[SENSITIVITY].text()} nats at step {first} and {end[SENSITIVITY].text()} at step {last}, "
        f"while the target's NLL goes from {start[NLL].value:.2f} to {end[NLL].value:.2f}."
    )
    return result(
        finding=finding + partner_note(samples),
        control=f"both ends swapped at random within users: change {null.mean():.3g} "
        f"(95 % within {np.quantile(np.abs(null), 0.95):.3g})",
        effect=effect,
        effect_name="change of log2 auxiliary:interaction attribution",
        better="lower",
        speaks=p <= 0.05 and effect.low > 0,
        measures={
            f"{name} at step {step}": e for step in (first, last) for name, e in estimates[step].items()
        },
        table=table(estimates),
        figures=[figure(estimates, name) for name in (LOG_RATIO, SENSITIVITY, NLL)],
    )


def table(estimates: dict[int, dict[str, Estimate]]) -> dict:
    """One row per step; each figure with its interval."""
    columns = ["step"]
    for name in (NLL, SENSITIVITY, LOG_RATIO):
        columns += [name, "low", "high"]
    rows = []
    for step, found in estimates.items():
        rows.append([step, *(value for e in found.values() for value in (e.value, e.low, e.high))])
    return {"columns": columns, "rows": rows}


def figure(estimates: dict[int, dict[str, Estimate]], name: str) -> dict:
    caption = {
        LOG_RATIO: "A rising curve: what is no user's weighs more and more.",
        SENSITIVITY: "A curve at zero: the history is not read.",
        NLL: "A falling curve is learning.",
    }
    lines = {
        name: [found[name].value for found in estimates.values()],
        "low": [found[name].low for found in estimates.values()],
        "high": [found[name].high for found in estimates.values()],
    }
    return {
        "kind": "line",
        "title": f"{name[0].upper()}{name[1:]} along training",
        "x_label": "optimizer step",
        "y_label": "log2" if name == LOG_RATIO else "nats",
        "caption": f"{caption[name]} Low and high: 95 % interval over users.",
        "series": [{"name": label, "x": list(estimates), "y": values} for label, values in lines.items()],
    }


def cost(context: AuditContext) -> Cost:
    return Cost(
        losses=PASSES * context.num_users(DEFAULT_USERS) * (1 + len(chosen_steps(context, MOST_STEPS)))
    )


AUDIT = Audit(
    title="Drift during training",
    question="Does training move the prediction from the user's history to the prompt's fixed words?",
    run=run,
    cost=cost,
    order=40,
    lacks=lacks_checkpoints,
)
