"""Audit `sensitivity`: does the model read the history? Target NLL with the true, a swapped and no history, and without instruction.

For user u with history h_u and target y_u:   d_swap = NLL(y_u | h_v) - NLL(y_u | h_u),  v another user,  likewise d_removed, d_blank.
A model that uses the history pays when it is swapped. Four passes over prompt and target per user; no catalogue is scored.
Control: the same difference against a second other user instead of the true one, whose expectation is zero.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap
from eval.audit.target_loss import TargetNll, target_nll
from gdrt_ds.data.corpus import Sample

TITLE = "History sensitivity"
QUESTION = "Does the model read the user's history, or does the prompt alone decide?"
DEFAULT_USERS = 64
VARIANTS = ("true history", "swapped history", "no history", "no instruction", "second swap")


def stands_in(other: Sample, sample: Sample) -> bool:
    """Whether the history of `other` can replace that of `sample`: another user, another history, and the target is not in it."""
    return (
        other.user_id != sample.user_id
        and sample.target not in other.history
        and other.history != sample.history
    )


def partners(samples: list[Sample], shift: int) -> list[int]:
    """For every sample another user whose history does not hold its target; `shift` picks different ones. Deterministic."""
    order = np.random.default_rng(11).permutation(len(samples)).tolist()
    place = {index: p for p, index in enumerate(order)}
    found = []
    for index, sample in enumerate(samples):
        candidates = [order[(place[index] + shift + step) % len(order)] for step in range(len(order))]
        others = [c for c in candidates if samples[c].user_id != sample.user_id]
        clean = [c for c in others if stands_in(samples[c], sample)]
        found.append((clean or others)[0])
    return found


def variant_prompts(context: AuditContext, samples: list[Sample]) -> dict[str, list[list[int]]]:
    """Prompt tokens of every variant, one list per sample."""
    encoder = context.recommender.encoder
    titles = [[context.catalogue.text_of(item) for item in s.history] for s in samples]
    tokens = lambda names, **how: encoder.encode(names, **how).input_ids.tolist()  # noqa: E731
    first, second = partners(samples, 1), partners(samples, 1 + max(1, len(samples) // 2))
    return {
        "true history": [tokens(t) for t in titles],
        "swapped history": [tokens(titles[p]) for p in first],
        "no history": [tokens([], mask_history=True)] * len(titles),
        "no instruction": [tokens(t, blank_instruction=True) for t in titles],
        "second swap": [tokens(titles[p]) for p in second],
    }


def measure(nll: dict[str, np.ndarray], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """NLL [U] per variant -> means, and paired differences to the true history."""
    found = {name: bootstrap(values, null=None, num=num_bootstrap, seed=seed) for name, values in nll.items()}
    for name in ("swapped history", "no history", "no instruction"):
        found[f"{name} - true"] = bootstrap(nll[name] - nll["true history"], num=num_bootstrap, seed=seed)
    found["control: second swap - swapped"] = bootstrap(
        nll["second swap"] - nll["swapped history"], num=num_bootstrap, seed=seed
    )
    return found


def losses_of(context: AuditContext, samples: list[Sample]) -> dict[str, TargetNll]:
    prompts = variant_prompts(context, samples)
    flat = [p for name in VARIANTS for p in prompts[name]]
    found = target_nll(context, flat, np.tile(context.targets(samples), len(VARIANTS)), "history sensitivity")
    cut = lambda values: dict(zip(VARIANTS, values.reshape(len(VARIANTS), len(samples))))  # noqa: E731
    full, renormalised = cut(found.full), cut(found.renormalised)
    return {name: TargetNll(full[name], renormalised[name]) for name in VARIANTS}


def run(context: AuditContext) -> dict:
    samples = context.users(DEFAULT_USERS)
    losses = losses_of(context, samples)
    options = context.options
    both = {
        objective: measure(
            {n: getattr(v, objective) for n, v in losses.items()}, options.num_bootstrap, options.seed
        )
        for objective in ("renormalised", "full")
    }
    found = both["renormalised"]
    effect = found["swapped history - true"]
    verdict = (
        "the history is read"
        if effect.low > 0
        else "no use of the history is shown"
        if effect.spans_null
        else "the true history misleads"
    )
    finding = (
        f"Another user's history changes the target's NLL by {effect.text()} nats over {effect.n} users ({verdict}); "
        f"no history: {found['no history - true'].text()}, no instruction: {found['no instruction - true'].text()}."
    )
    rows = [
        [
            name,
            *(
                cell
                for objective in ("renormalised", "full")
                for cell in (
                    both[objective][name].value,
                    both[objective][name].low,
                    both[objective][name].high,
                )
            ),
        ]
        for name in found
    ]
    bars = [
        "swapped history - true",
        "no history - true",
        "no instruction - true",
        "control: second swap - swapped",
    ]
    figure = {
        "kind": "bar",
        "title": "What the target's NLL pays without its context",
        "horizontal": True,
        "y_label": "nats above the true prompt",
        "legend": False,
        "caption": "A bar away from zero is context that the model uses; the control compares two wrong histories.",
        "categories": bars,
        "series": [
            {
                "name": "NLL difference",
                "values": [found[b].value for b in bars],
                "low": [found[b].low for b in bars],
                "high": [found[b].high for b in bars],
            }
        ],
    }
    control = f"two wrong histories against each other: {found['control: second swap - swapped'].text()} nats, expected 0"
    return result(
        TITLE,
        QUESTION,
        finding=finding,
        control=control,
        effect=effect,
        effect_name="NLL(swapped history) - NLL(true), nats",
        better="higher",
        speaks=not effect.low > 0,
        measures={**found, **{f"full: {k}": v for k, v in both["full"].items()}},
        table={
            "columns": [
                "prompt",
                "NLL over the catalogue",
                "low",
                "high",
                "NLL over the vocabulary",
                "low",
                "high",
            ],
            "rows": rows,
        },
        figures=[figure],
    )


AUDIT = Audit(
    "sensitivity",
    TITLE,
    QUESTION,
    run,
    lambda context: Cost(losses=len(VARIANTS) * context.num_users(DEFAULT_USERS)),
)
