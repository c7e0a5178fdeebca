"""Audit `language`: what does the target's probability hang on?

Instruction, template and generated prefix are auxiliary: they are no user's. The history is the interaction
part.

    A_s = mean over target tokens of |a[s, t]|        (feature ablation, eval.audit.attribution)
    share_s = A_s / sum of A;   density_s = A_s / tokens of s
    ratio = (A_instruction + A_template + A_prefix) / A_history

This is reported of the model and of its base, so that tuning shows as a change of the ratio, with NLL and
accuracy by relevance group. Control: the same model with every history swapped for another user's. What
looks like use of this user's history but is only the effect of any text in that place stays, and is shown
beside it.

Shapes: U users, S parts of the context.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eval.audit.attribution import (
    AUXILIARY,
    INTERACTION,
    PARTS,
    Attribution,
    attribute,
    attribution_rows,
    baseline_token,
    effects_of,
    prompt_and_target,
)
from eval.audit.base import Audit, Cost, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.partners import partner_note, partners
from eval.audit.score_rows import target_gains
from eval.metrics.slices import MIN_SIZE
from gdrt_ds.data.corpus import Sample
from gdrt_ds.data.prompts import SEGMENTS

DEFAULT_USERS = 32
EXAMPLES = 2  # prompts that are drawn piece by piece
EXAMPLE_PIECES = 20  # about how many passes each of them takes
SCORING = "full"
TINY = 1e-9  # a part without any effect (a planted scorer) gives a finite, huge ratio
RATIO = "auxiliary:interaction"
LOG_RATIO = "log2 ratio"
CHANGE = "ratio after / before tuning"
WORST, GAP = "worst group NLL", "relevance group NLL gap"

Estimates = dict[str, Estimate]


def token_means(found: list[Attribution]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per user: sums of |effects| [U, S], target tokens [U], tokens per part [U, S]."""
    sums = np.array([np.abs(a.effects).sum(axis=1) for a in found])
    counts = np.array([float(len(a.loss)) for a in found])
    sizes = np.array([a.tokens for a in found])
    return sums, counts, sizes


def measure(found: list[Attribution], num_bootstrap: int, seed: int) -> Estimates:
    """Strengths, shares, densities and the auxiliary:interaction ratio, with intervals over users."""
    sums, counts, sizes = token_means(found)
    num_parts = len(PARTS)

    def statistic(rows: np.ndarray) -> np.ndarray:
        strength = rows[:, :num_parts].sum(axis=0) / rows[:, num_parts].sum()
        size = rows[:, num_parts + 1 :].mean(axis=0)
        ratio = (strength[list(AUXILIARY)].sum() + TINY) / (strength[INTERACTION] + TINY)
        share = strength / max(strength.sum(), TINY)
        density = strength / np.maximum(size, TINY)
        return np.concatenate([strength, share, density, [ratio, np.log2(ratio)]])

    columns = np.hstack([sums, counts[:, None], sizes])
    values = bootstrap(columns, statistic, null=None, num=num_bootstrap, seed=seed)
    names = [f"{what}: {part}" for what in ("strength", "share", "density") for part in PARTS]
    estimates = dict(zip([*names, RATIO, LOG_RATIO], values))
    estimates[RATIO] = replace(estimates[RATIO], null=1.0)
    estimates[LOG_RATIO] = replace(estimates[LOG_RATIO], null=0.0)
    return estimates


def change(before: list[Attribution], after: list[Attribution], num_bootstrap: int, seed: int) -> Estimate:
    """Ratio after over ratio before, paired over users; its null value is 1."""
    columns = []
    for found in (before, after):
        sums, _, _ = token_means(found)
        columns += [sums[:, list(AUXILIARY)].sum(axis=1), sums[:, INTERACTION]]

    def statistic(rows: np.ndarray) -> float:
        auxiliary_before, own_before, auxiliary_after, own_after = rows.sum(axis=0) + TINY
        return (auxiliary_after / own_after) / (auxiliary_before / own_before)

    return bootstrap(np.stack(columns, axis=1), statistic, null=1.0, num=num_bootstrap, seed=seed)


def pool_neighbours(groups: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """[U] place of each user's group in a list of names, in which every group has MIN_SIZE users or more.

    Relevance groups have an order, so one that is too small is put together with those above it. What is left
    at the upper end joins the last.

    Args:
        groups: int[U].
    """
    parts: list[list[int]] = []
    waiting: list[int] = []
    for group in np.unique(groups):
        waiting.append(int(group))
        if np.isin(groups, waiting).sum() >= MIN_SIZE:
            parts.append(waiting)
            waiting = []
    if waiting:
        parts = [*parts[:-1], [*parts[-1], *waiting]] if parts else [waiting]
    names = [f"group {p[0]}" if len(p) == 1 else f"groups {p[0]} to {p[-1]}" for p in parts]
    place_of = {group: place for place, part in enumerate(parts) for group in part}
    return np.array([place_of[int(group)] for group in groups]), names


def group_table(
    groups: np.ndarray, nll: np.ndarray, gain: np.ndarray | None, num_bootstrap: int, seed: int
) -> tuple[list[list], Estimates]:
    """Accuracy by relevance group. Neighbouring groups are put together until each has 10 users.

    Args:
        groups: [U] relevance group of each target.
        nll: [U] of each target.
        gain: [U] NDCG@10 of each target, or None.
    Returns:
        rows (group, users, NLL with interval, NDCG@10 with interval); worst group and gap of the NLL, which
        are left out where one group is left.
    """
    settings = {"num": num_bootstrap, "seed": seed}
    place, names = pool_neighbours(groups)
    rows = []
    for index, name in enumerate(names):
        members = place == index
        loss = bootstrap(nll[members], null=None, **settings)
        row = [name, int(members.sum()), loss.value, loss.low, loss.high]
        if gain is None:
            row += [None, None, None]
        else:
            accuracy = bootstrap(gain[members], null=None, **settings)
            row += [accuracy.value, accuracy.low, accuracy.high]
        rows.append(row)

    if len(names) < 2:
        return rows, {}

    def spread(drawn: np.ndarray) -> np.ndarray:
        means = [drawn[drawn[:, 0] == g, 1].mean() for g in np.unique(drawn[:, 0])]
        return np.array([max(means), max(means) - min(means)])

    columns = np.stack([place.astype(float), nll], axis=1)
    worst, gap = bootstrap(columns, spread, null=None, bounds=(0, np.inf), **settings)
    return rows, {WORST: worst, GAP: gap}


def example_prompts(context: AuditContext, samples: list[Sample]) -> list[dict]:
    """Prompts in which every piece is weighted by its own ablation.

    A piece is the instruction, a part of the template or one history item; the target stands at the end.
    """
    tokenizer = context.recommender.encoder.tokenizer
    baseline = baseline_token(tokenizer)
    prompts = []
    for sample in samples:
        encoded, prompt, target = prompt_and_target(context, sample)
        cut = len(prompt)
        segments = encoded.segments[:cut]
        new_piece = (np.diff(segments) != 0) | (np.diff(encoded.item_slot[:cut]) != 0)
        bounds = [0, *(np.flatnonzero(new_piece) + 1).tolist(), cut]
        pieces = list(zip(bounds, bounds[1:]))
        places = np.arange(cut)
        masks = [(places >= low) & (places < high) for low, high in pieces]
        rows, labels = attribution_rows(prompt, target, masks, baseline, prefix=False)
        losses = [found[SCORING] for found in context.losses(rows, "example prompts", labels)]
        tokens = [
            {
                "text": tokenizer.decode(prompt[low:high]),
                "segment": SEGMENTS[segments[low]],
                "weight": float(weight),
            }
            for (low, high), weight in zip(pieces, effects_of(losses).sum(axis=1))
        ]
        tokens.append({"text": tokenizer.decode(target), "segment": "target"})
        nats = -losses[0].sum()
        title = f"user {sample.user_id}: log-probability of the target, {nats:.1f} nats"
        prompts.append({"title": title, "tokens": tokens})
    return prompts


def run(context: AuditContext) -> dict:
    options = context.options
    samples = context.users(DEFAULT_USERS)
    settings = {"num_bootstrap": options.num_bootstrap, "seed": options.seed}
    found = attribute(context, samples, SCORING)
    mine = measure(found, **settings)
    control = measure(_with_swapped_histories(context, samples), **settings)
    models = {"this model": mine, "control: swapped histories": control}
    measures = dict(mine)
    before_after = ""
    if context.has_adapter:
        before = attribute(context.base(), samples, SCORING, what="attribution of the base model")
        models = {"base model": measure(before, **settings), **models}
        measures[CHANGE] = change(before, found, **settings)
        before_after = (
            f"; before tuning {models['base model'][RATIO].value:.3g}, "
            f"after / before {measures[CHANGE].text()}"
        )
    ratio = mine[RATIO]
    verdict = mine[LOG_RATIO]
    finding = (
        f"Auxiliary to interaction attribution is {ratio.text()} over {ratio.n} users "
        f"({in_words(verdict)}){before_after}."
    )
    group_rows, group_note, spread = _relevance(context, samples, settings)
    measures |= spread
    figures = [shares_figure(models), examples_figure(context, samples[:EXAMPLES])]
    if group_rows:
        figures.append(groups_figure(group_rows))
    return result(
        finding=finding + group_note + partner_note(samples),
        effect=verdict,
        effect_name=f"log2 of {RATIO}",
        better="lower",
        speaks=verdict.low > 0,
        control=f"with another user's history in place, the ratio is {control[RATIO].text()}: "
        "the part of the history's attribution that any text in its place would get",
        measures=measures,
        table=table(models),
        figures=figures,
        relevance_groups={
            "columns": ["group", "users", "NLL", "low", "high", "NDCG@10", "low", "high"],
            "rows": group_rows,
        },
    )


def _with_swapped_histories(context: AuditContext, samples: list[Sample]) -> list[Attribution]:
    """The control: every user's target behind another user's history."""
    swapped = [
        replace(sample, history=samples[partner].history)
        for sample, partner in zip(samples, partners(samples, 1))
    ]
    return attribute(context, swapped, SCORING, what="control: swapped histories")


def in_words(verdict: Estimate) -> str:
    """What log2 of the ratio shows."""
    if verdict.low > 0:
        return "auxiliary tokens weigh more"
    if verdict.spans_null:
        return "neither side is shown to weigh more"
    return "the history weighs more"


def table(models: dict[str, Estimates]) -> dict:
    """One row per model."""
    columns = ["model"]
    columns += [f"share: {part}" for part in PARTS]
    columns += [f"nats per token: {part}" for part in PARTS]
    columns += [RATIO, "low", "high"]
    rows = []
    for name, found in models.items():
        row: list = [name]
        row += [found[f"share: {part}"].value for part in PARTS]
        row += [found[f"density: {part}"].value for part in PARTS]
        row += [found[RATIO].value, found[RATIO].low, found[RATIO].high]
        rows.append(row)
    return {"columns": columns, "rows": rows}


def shares_figure(models: dict[str, Estimates]) -> dict:
    return {
        "kind": "bar",
        "title": "What the target's log-probability hangs on",
        "stacked": True,
        "percent": True,
        "categories": list(models),
        "caption": "Shares of feature-ablation attribution; "
        "the history is the only part that differs between users.",
        "series": [
            {"name": part, "values": [found[f"share: {part}"].value for found in models.values()]}
            for part in PARTS
        ],
    }


def examples_figure(context: AuditContext, samples: list[Sample]) -> dict:
    return {
        "kind": "tokens",
        "title": "Where the target's probability comes from",
        "prompts": example_prompts(context, samples),
        "caption": "Each piece is ablated alone; warm raises the target's probability, cool lowers it.",
    }


def groups_figure(rows: list[list]) -> dict:
    """Rows of `group_table` as bars of the NLL."""
    return {
        "kind": "bar",
        "title": "Target NLL by relevance group",
        "x_label": "group 0 is least tied to the prompt's own words",
        "y_label": "nats",
        "legend": False,
        "caption": "Unequal bars are unequal service: "
        "low groups are titles that the prompt alone does not predict.",
        "categories": [row[0] for row in rows],
        "series": [
            {
                "name": "NLL",
                "values": [row[2] for row in rows],
                "low": [row[3] for row in rows],
                "high": [row[4] for row in rows],
            }
        ],
    }


def _relevance(context: AuditContext, samples: list[Sample], settings: dict) -> tuple[list, str, Estimates]:
    """Rows by relevance group, a sentence for the finding, and worst group and gap."""
    if context.subject.group_of_entry is None:
        return [], " Relevance groups: the run has no relevance table.", {}
    targets = context.targets(samples)
    scores = context.scores([sample.history for sample in samples], "catalogue scores")
    rows, spread = group_table(
        context.subject.group_of_entry[targets],
        -scores[np.arange(len(targets)), targets],
        target_gains(scores, targets),
        **settings,
    )
    if not spread:
        note = f" Relevance groups: there are not {2 * MIN_SIZE} users for two of them, so none is the worst."
        return rows, note, {}
    note = f" Over relevance groups the worst NLL is {spread[WORST].text()}, the gap {spread[GAP].text()}."
    return rows, note, spread


def cost(context: AuditContext) -> Cost:
    users = context.num_users(DEFAULT_USERS)
    models = 3 if context.has_adapter else 2  # the base, the model and the control
    passes = (len(PARTS) + 1) * users * models + EXAMPLES * EXAMPLE_PIECES
    scorings = 0
    if context.subject.group_of_entry is not None:
        scorings = context.unscored(DEFAULT_USERS)
    return Cost(losses=passes, scorings=scorings)


AUDIT = Audit(
    title="Language bias: auxiliary against interaction tokens",
    question="Does the target's probability hang on the prompt's words and the title's own beginning, "
    "or on the user's history?",
    run=run,
    cost=cost,
    order=12,
)
