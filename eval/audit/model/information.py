"""Audit `information`: how much do the scores tell about the target?

And how much of that comes from the user's own history? With p_T(i | h) = softmax over the catalogue of
log-probability / T, targets y_u, histories h_u, and I entries,

    L_own   = min over T of mean_u        -ln p_T(y_u | h_u)
    L_other = min over T of mean_u mean_v -ln p_T(y_u | h_v)
    known about the target = ln I - L_own
                           = (ln I - L_other: without the own history)  +  (L_other - L_own: through it)

in nats. v runs over all other users in the audit whose history does not hold y_u. Each side has the
temperature that suits it best, so that a training which only makes scores flatter or sharper changes
nothing here (eval/metrics/calibration.py). `sensitivity` is the same difference as the scores stand, and
moves with their sharpness. One exact scoring per user serves all pairs. Control: one other user's history
in the place of the own one; expected 0.

Shapes: U users, I catalogue entries, T temperatures.
"""

from __future__ import annotations

import numpy as np

from eval.audit.base import Audit, estimate_table, matrix_cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.partners import partner_note, stands_in
from eval.metrics.calibration import TEMPERATURES, log_sums, lowest
from gdrt_ds.data.corpus import Sample

DEFAULT_USERS = 64
EFFECT = "known through the history"
KNOWN = "known about the target"
WITHOUT = "known without the history"
CONTROL = "control: one other user's history"
MEASURES = {
    EFFECT: 0.0,
    KNOWN: 0.0,
    WITHOUT: 0.0,
    CONTROL: 0.0,
    "calibrated NLL": None,
    "NLL as scored": None,
    "NLL as scored: other histories - own": 0.0,
    "temperature": 1.0,
    "temperature, other histories": 1.0,
}
"""Name -> value where nothing is known; None = there is no such value."""


def side_curves(
    scores: np.ndarray, targets: np.ndarray, clean: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-ln p_T(target of u) behind three kinds of history, float64 [U, T] each.

    Args:
        scores: [U, I] log-probabilities behind each user's history; NaN counts as impossible.
        targets: [U] entry indices.
        clean: bool [U, U], whose history stands in for whose; every row has a partner.
    Returns:
        with u's own history, averaged over all clean partners' histories, and with one of them.
    """
    rng = np.random.default_rng([seed, 5])
    scores = np.where(np.isnan(scores), -np.inf, scores)
    normalisers_vT = np.stack([log_sums(row) for row in scores])
    own, other, one = [], [], []
    for u, target in enumerate(targets):
        # The target of u behind the history of every v.
        curves_vT = normalisers_vT - scores[:, target, None] / TEMPERATURES
        partners = np.flatnonzero(clean[u])
        own.append(curves_vT[u])
        other.append(curves_vT[partners].mean(axis=0))
        one.append(curves_vT[rng.choice(partners)])
    return np.stack(own), np.stack(other), np.stack(one)


def clean_pairs(samples: list[Sample]) -> np.ndarray:
    """Bool [U, U]: the history of v stands in for that of u; where none does, that of every other user."""
    found = np.array([[stands_in(v, u) for v in samples] for u in samples])
    other = ~np.eye(len(samples), dtype=bool)
    return np.where(found.any(axis=1, keepdims=True), found, other)


def measure(
    own: np.ndarray,
    other: np.ndarray,
    one: np.ndarray,
    num_items: int,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The curves [U, T] of `side_curves`, and I -> all `MEASURES`."""
    at_one = int(np.argmin(np.abs(TEMPERATURES - 1)))
    ceiling = np.log(num_items)

    def statistic(rows: np.ndarray) -> np.ndarray:
        means = rows.mean(axis=0).reshape(3, TEMPERATURES.size)
        (low_own, low_other, low_one), (t_own, t_other, _) = lowest(means)
        return np.array(
            [
                low_other - low_own,
                ceiling - low_own,
                ceiling - low_other,
                low_other - low_one,
                low_own,
                means[0, at_one],
                means[1, at_one] - means[0, at_one],
                t_own,
                t_other,
            ]
        )

    curves = np.concatenate([own, other, one], axis=1)
    found = bootstrap(curves, statistic, null=None, num=num_bootstrap, seed=seed)
    return {
        name: Estimate(e.value, e.low, e.high, e.n, null) for (name, null), e in zip(MEASURES.items(), found)
    }


def sureness(temperature: Estimate) -> str:
    if temperature.low > 1:
        return "too sure"
    if temperature.high < 1:
        return "not sure enough"
    if np.isnan([temperature.low, temperature.high]).any():
        return "without an interval"
    return "not shown to be too sure or not sure enough"


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    curves = side_curves(scores, context.targets(samples), clean_pairs(samples), options.seed)
    num_items = scores.shape[1]
    found = measure(*curves, num_items, options.num_bootstrap, options.seed)
    effect = found[EFFECT]
    finding = (
        f"Of the ln {num_items:,} = {np.log(num_items):.2f} nats that name a target, the scores give "
        f"{found[KNOWN].text()} over {effect.n} users: {effect.text()} through the user's history, "
        f"{found[WITHOUT].text()} without it. Best temperature {found['temperature'].value:.2g} "
        f"({sureness(found['temperature'])})."
    )
    return result(
        finding=finding + partner_note(samples),
        control=f"one other user's history for the own one: {found[CONTROL].text()} nats, expected 0",
        effect=effect,
        effect_name=f"{EFFECT}, nats",
        better="higher",
        speaks=effect.not_above_null,
        measures=found,
        table=estimate_table(found),
        figures=[figure(*curves, num_items)],
    )


def figure(own: np.ndarray, other: np.ndarray, one: np.ndarray, num_items: int) -> dict:
    lines = {
        "the user's own history": own.mean(axis=0),
        "other users' histories": other.mean(axis=0),
        "knows nothing: ln I": np.full(TEMPERATURES.size, np.log(num_items)),
    }
    x = np.log2(TEMPERATURES).tolist()
    return {
        "kind": "line",
        "title": "Target NLL over the temperature of the scores",
        "x_label": "log2 of the temperature (0: as scored; right: flatter)",
        "y_label": "nats",
        "caption": "What lies between the lowest points is known through the history; "
        "between the upper one and the even line, without it.",
        "series": [{"name": name, "x": x, "y": values.tolist()} for name, values in lines.items()],
    }


AUDIT = Audit(
    title="Information about the target",
    question="How much do the scores know about the next item, and does that come from the user's history?",
    run=run,
    cost=matrix_cost(DEFAULT_USERS),
    order=11,
)
