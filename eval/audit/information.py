"""Audit `information`: how much do the scores tell about the target, and how much of that comes from the user's own history?

With p_T(i | h) = softmax over the catalogue of log-probability / T, targets y_u, histories h_u, and I entries,
    L_own   = min over T of mean_u        -ln p_T(y_u | h_u)
    L_other = min over T of mean_u mean_v -ln p_T(y_u | h_v),   v all other users in the audit whose history does not hold y_u
    known about the target = ln I - L_own  =  (ln I - L_other: without the own history)  +  (L_other - L_own: through it)
in nats. Each side has the temperature that suits it best, so that a training which only makes scores flatter or sharper changes nothing
here (eval/metrics/calibration.py); `sensitivity` is the same difference as the scores stand, and moves with their sharpness.
One exact scoring per user serves all pairs. Control: one other user's history in the place of the own one; expected 0.

Shapes: U users, I catalogue entries, T temperatures.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap
from eval.audit.sensitivity import stands_in
from eval.metrics.calibration import TEMPERATURES, log_sums, lowest
from gdrt_ds.data.corpus import Sample

TITLE = "Information about the target"
QUESTION = "How much do the scores know about the next item, and does that come from the user's history?"
DEFAULT_USERS = 64
EFFECT = "known through the history"


def side_curves(
    scores: np.ndarray, targets: np.ndarray, clean: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-ln p_T(target of u) with u's own history, averaged over all clean partners' histories, and with one of them: float64 [U, T] each.

    Args:
        scores: [U, I] log-probabilities behind each history; NaN counts as impossible. targets: [U]. clean: bool[U, U], every row has a partner.
    """
    rng, scores = np.random.default_rng([seed, 5]), np.where(np.isnan(scores), -np.inf, scores)
    normalisers = np.stack([log_sums(row) for row in scores])  # [v, T]
    sides: tuple[list, list, list] = ([], [], [])
    for u, target in enumerate(targets):
        curves = (
            normalisers - scores[:, target, None] / TEMPERATURES
        )  # [v, T]: u's target behind the history of every v
        partners = np.flatnonzero(clean[u])
        for side, values in zip(
            sides, (curves[u], curves[partners].mean(axis=0), curves[rng.choice(partners)])
        ):
            side.append(values)
    return tuple(np.stack(side) for side in sides)


def clean_pairs(samples: list[Sample]) -> np.ndarray:
    """Bool[U, U]: the history of v stands in for that of u; where no user's does, that of every other user."""
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
    """own, other, one: [U, T] of side_curves. num_items: I."""
    at_one = int(np.argmin(np.abs(TEMPERATURES - 1)))

    def statistic(rows: np.ndarray) -> np.ndarray:
        means = rows.mean(axis=0).reshape(3, TEMPERATURES.size)
        (low_own, low_other, low_one), (t_own, t_other, _) = lowest(means)
        ceiling = np.log(num_items)
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

    names = [
        (EFFECT, 0.0),
        ("known about the target", 0.0),
        ("known without the history", 0.0),
        ("control: one other user's history", 0.0),
        ("calibrated NLL", None),
        ("NLL as scored", None),
        ("NLL as scored: other histories - own", 0.0),
        ("temperature", 1.0),
        ("temperature, other histories", 1.0),
    ]
    found = bootstrap(
        np.concatenate([own, other, one], axis=1), statistic, null=None, num=num_bootstrap, seed=seed
    )
    return {name: Estimate(e.value, e.low, e.high, e.n, null) for (name, null), e in zip(names, found)}


def sureness(temperature: Estimate) -> str:
    return (
        "too sure"
        if temperature.low > 1
        else "not sure enough"
        if temperature.high < 1
        else "as sure as they should be"
    )


def run(context: AuditContext) -> dict:
    options = context.options
    samples, scores = context.matrix(DEFAULT_USERS)
    own, other, one = side_curves(scores, context.targets(samples), clean_pairs(samples), options.seed)
    num_items = scores.shape[1]
    found = measure(own, other, one, num_items, options.num_bootstrap, options.seed)
    effect, known, control = (
        found[EFFECT],
        found["known about the target"],
        found["control: one other user's history"],
    )
    finding = (
        f"Of the ln {num_items:,} = {np.log(num_items):.2f} nats that name a target, the scores give {known.text()} over {effect.n} users: "
        f"{effect.text()} through the user's history, {found['known without the history'].text()} without it. "
        f"Best temperature {found['temperature'].value:.2g} ({sureness(found['temperature'])})."
    )
    figure = {
        "kind": "line",
        "title": "Target NLL over the temperature of the scores",
        "x_label": "log2 of the temperature (0: as scored; right: flatter)",
        "y_label": "nats",
        "caption": "What lies between the lowest points is known through the history; between the upper one and the even line, without it.",
        "series": [
            {"name": name, "x": np.log2(TEMPERATURES).tolist(), "y": np.asarray(values).tolist()}
            for name, values in (
                ("the user's own history", own.mean(axis=0)),
                ("other users' histories", other.mean(axis=0)),
                ("knows nothing: ln I", np.full(TEMPERATURES.size, np.log(num_items))),
            )
        ],
    }
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        control=f"one other user's history for the own one: {control.text()} nats, expected 0",
        effect=effect,
        effect_name=f"{EFFECT}, nats",
        better="higher",
        speaks=not effect.low > 0,
        measures=found,
        table={
            "columns": ["measure", "value", "low", "high"],
            "rows": [[n, e.value, e.low, e.high] for n, e in found.items()],
        },
        figures=[figure],
    )


AUDIT = Audit(
    "information", TITLE, QUESTION, run, lambda context: Cost(scorings=context.unscored(DEFAULT_USERS))
)
