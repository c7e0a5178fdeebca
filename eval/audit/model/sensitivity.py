"""Audit `sensitivity`: does the model read the history?

Target NLL with the true history, with a swapped one, with none, and without the instruction. For user u
with history h_u and target y_u:

    d_swap = NLL(y_u | h_v) - NLL(y_u | h_u),    v another user;    likewise d_removed and d_blank

A model that uses the history pays when it is swapped. This takes five passes over prompt and target per
user; no catalogue is scored. A history that is swapped is another user's own prompt, so three of the five are
behind prompts that are read once. Control: the same difference between a second other user's history and the
first one's, whose expectation is zero.
"""

from __future__ import annotations

import numpy as np

from eval.audit.base import Audit, Cost, estimate_series, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.partners import partner_note, partners
from eval.audit.target_loss import TargetNll, target_nll
from gdrt_ds.data.corpus import Sample

DEFAULT_USERS = 64
TRUE, SWAPPED, SECOND = "true history", "swapped history", "second swap"
VARIANTS = (TRUE, SWAPPED, "no history", "no instruction", SECOND)
SCORINGS = ("renormalised", "full")
CONTROL = "control: second swap - swapped"


def variant_prompts(context: AuditContext, samples: list[Sample]) -> dict[str, list[list[int]]]:
    """Prompt tokens of every variant, one list per sample."""
    encoder = context.recommender.encoder
    titles = [[context.catalogue.text_of(item) for item in sample.history] for sample in samples]
    first = partners(samples, 1)
    second = partners(samples, 1 + max(1, len(samples) // 2))

    def tokens(names: list[str], **how: bool) -> list[int]:
        return encoder.encode(names, **how).input_ids.tolist()

    return {
        TRUE: [tokens(own) for own in titles],
        SWAPPED: [tokens(titles[partner]) for partner in first],
        "no history": [tokens([], mask_history=True)] * len(titles),
        "no instruction": [tokens(own, blank_instruction=True) for own in titles],
        SECOND: [tokens(titles[partner]) for partner in second],
    }


def measure(nll: dict[str, np.ndarray], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """NLL [U] per variant -> means, and paired differences to the true history."""
    settings = {"num": num_bootstrap, "seed": seed}
    found = {name: bootstrap(values, null=None, **settings) for name, values in nll.items()}
    for name in (SWAPPED, "no history", "no instruction"):
        found[f"{name} - true"] = bootstrap(nll[name] - nll[TRUE], **settings)
    found[CONTROL] = bootstrap(nll[SECOND] - nll[SWAPPED], **settings)
    return found


def losses_of(context: AuditContext, samples: list[Sample]) -> dict[str, TargetNll]:
    """NLL of every sample's target behind each variant of its prompt."""
    prompts = variant_prompts(context, samples)
    flat = [prompt for name in VARIANTS for prompt in prompts[name]]
    targets = np.tile(context.targets(samples), len(VARIANTS))
    found = target_nll(context, flat, targets, "history sensitivity")
    full = found.full.reshape(len(VARIANTS), len(samples))
    renormalised = found.renormalised.reshape(len(VARIANTS), len(samples))
    return {name: TargetNll(full[j], renormalised[j]) for j, name in enumerate(VARIANTS)}


def run(context: AuditContext) -> dict:
    options = context.options
    samples = context.users(DEFAULT_USERS)
    losses = losses_of(context, samples)
    both = {}
    for scoring in SCORINGS:
        nll = {name: getattr(loss, scoring) for name, loss in losses.items()}
        both[scoring] = measure(nll, options.num_bootstrap, options.seed)
    found = both["renormalised"]
    effect = found["swapped history - true"]
    finding = (
        f"Another user's history changes the target's NLL by {effect.text()} nats over {effect.n} users "
        f"({verdict(effect)}); no history: {found['no history - true'].text()}, "
        f"no instruction: {found['no instruction - true'].text()}."
    )
    return result(
        finding=finding + partner_note(samples),
        control=f"two wrong histories against each other: {found[CONTROL].text()} nats, expected 0",
        effect=effect,
        effect_name="NLL(swapped history) - NLL(true), nats",
        better="higher",
        speaks=effect.not_above_null,
        measures={**found, **{f"full: {name}": e for name, e in both["full"].items()}},
        table=table(both),
        figures=[figure(found)],
    )


def verdict(effect: Estimate) -> str:
    if effect.low > 0:
        return "the history is read"
    if effect.spans_null:
        return "no use of the history is shown"
    return "the true history misleads"


def table(both: dict[str, dict[str, Estimate]]) -> dict:
    """One row per variant and difference, under both scorings."""
    rows = []
    for name in both["renormalised"]:
        row: list = [name]
        for scoring in SCORINGS:
            e = both[scoring][name]
            row += [e.value, e.low, e.high]
        rows.append(row)
    columns = ["prompt", "NLL over the catalogue", "low", "high", "NLL over the vocabulary", "low", "high"]
    return {"columns": columns, "rows": rows}


def figure(found: dict[str, Estimate]) -> dict:
    bars = ["swapped history - true", "no history - true", "no instruction - true", CONTROL]
    return {
        "kind": "bar",
        "title": "What the target's NLL pays without its context",
        "horizontal": True,
        "y_label": "nats above the true prompt",
        "legend": False,
        "caption": "A bar away from zero is context that the model uses; "
        "the control compares two wrong histories.",
        "categories": bars,
        "series": [estimate_series("NLL difference", [found[bar] for bar in bars])],
    }


def cost(context: AuditContext) -> Cost:
    return Cost(losses=len(VARIANTS) * context.num_users(DEFAULT_USERS))


AUDIT = Audit(
    title="History sensitivity",
    question="Does the model read the user's history, or does the prompt alone decide?",
    run=run,
    cost=cost,
    order=10,
)
