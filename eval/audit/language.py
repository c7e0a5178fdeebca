"""Audit `language`: what does the target's probability hang on: instruction, template, generated prefix (auxiliary), or the history?

    A_s = mean over target tokens of |a[s, t]|        (feature ablation, eval.audit.attribution)
    share_s = A_s / sum of A;   density_s = A_s / tokens of s;   ratio = (A_instruction + A_template + A_prefix) / A_history
Reported of this model and of its base, so that tuning shows as a change of the ratio; with NLL and accuracy by relevance group.
Control: the same model with every history swapped for another user's: what looks like use of this user's history but is only
the effect of any text in that place stays, and is shown beside it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eval.audit import attribution as attr
from eval.audit.context import Audit, AuditContext, Cost, result
from eval.audit.inference import Estimate, bootstrap, ndcg, target_ranks
from eval.audit.sensitivity import partners
from gdrt_ds.data.prompts import SEGMENTS

TITLE = "Language bias: auxiliary against interaction tokens"
QUESTION = "Does the target's probability hang on the prompt's words and the title's own beginning, or on the user's history?"
DEFAULT_USERS, EXAMPLES = 32, 2
OBJECTIVE = "full"


def token_means(found: list[attr.Attribution]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per user: sums of |effects| [U, S], target tokens [U], tokens per part [U, S]."""
    return (
        np.array([np.abs(a.effects).sum(axis=1) for a in found]),
        np.array([float(len(a.loss)) for a in found]),
        np.array([a.tokens for a in found]),
    )


def measure(found: list[attr.Attribution], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """Shares, densities and the auxiliary:interaction ratio, with intervals over users."""
    sums, counts, sizes = token_means(found)
    num_parts = len(attr.PARTS)
    tiny = 1e-9  # a part without any effect (a planted scorer) gives a finite, huge ratio

    def statistic(rows: np.ndarray) -> np.ndarray:
        strength = rows[:, :num_parts].sum(axis=0) / rows[:, num_parts].sum()
        size = rows[:, num_parts + 1 :].mean(axis=0)
        ratio = (strength[list(attr.AUXILIARY)].sum() + tiny) / (strength[attr.INTERACTION] + tiny)
        return np.concatenate(
            [
                strength,
                strength / max(strength.sum(), tiny),
                strength / np.maximum(size, tiny),
                [ratio, np.log2(ratio)],
            ]
        )

    values = bootstrap(
        np.hstack([sums, counts[:, None], sizes]), statistic, null=None, num=num_bootstrap, seed=seed
    )
    names = [f"{what}: {part}" for what in ("strength", "share", "density") for part in attr.PARTS] + [
        "auxiliary:interaction",
        "log2 ratio",
    ]
    estimates = dict(zip(names, values))
    estimates["auxiliary:interaction"] = replace(estimates["auxiliary:interaction"], null=1.0)
    estimates["log2 ratio"] = replace(estimates["log2 ratio"], null=0.0)
    return estimates


def change(
    before: list[attr.Attribution], after: list[attr.Attribution], num_bootstrap: int, seed: int
) -> Estimate:
    """Ratio after over ratio before, paired over users; null 1."""
    columns = []
    for found in (before, after):
        sums, _, _ = token_means(found)
        columns += [sums[:, list(attr.AUXILIARY)].sum(axis=1), sums[:, attr.INTERACTION]]

    def statistic(rows: np.ndarray) -> float:
        a, b, c, d = rows.sum(axis=0) + 1e-9
        return (c / d) / (a / b)

    return bootstrap(np.stack(columns, axis=1), statistic, null=1.0, num=num_bootstrap, seed=seed)


def group_table(
    groups: np.ndarray, nll: np.ndarray, gain: np.ndarray | None, num_bootstrap: int, seed: int
) -> tuple[list[list], dict[str, Estimate]]:
    """Rows (group, users, NLL, NDCG@10 with intervals), and worst group and gap of the NLL. groups: [U]."""
    rows, means = [], {}
    for group in sorted(set(groups.tolist())):
        members = groups == group
        value = bootstrap(nll[members], null=None, num=num_bootstrap, seed=seed)
        accuracy = (
            bootstrap(gain[members], null=None, num=num_bootstrap, seed=seed) if gain is not None else None
        )
        rows.append(
            [
                f"group {group}",
                int(members.sum()),
                value.value,
                value.low,
                value.high,
                *((accuracy.value, accuracy.low, accuracy.high) if accuracy else (None, None, None)),
            ]
        )
        means[group] = value
    present = sorted(means)

    def spread(rows: np.ndarray) -> np.ndarray:
        per_group = [rows[rows[:, 0] == g, 1].mean() for g in present if (rows[:, 0] == g).any()]
        return np.array([max(per_group), max(per_group) - min(per_group)])

    worst, gap = bootstrap(
        np.stack([groups.astype(float), nll], axis=1), spread, null=None, num=num_bootstrap, seed=seed
    )
    return rows, {"worst group NLL": worst, "relevance group NLL gap": gap}


def example_prompts(context: AuditContext, samples) -> list[dict]:
    """Prompts with every piece (instruction, template piece, each history item, each target token) weighted by its own ablation."""
    encoder, catalogue, prompts = context.recommender.encoder, context.catalogue, []
    tokenizer = encoder.tokenizer
    baseline = attr.baseline_token(tokenizer)
    for sample in samples:
        encoded = encoder.encode(
            [catalogue.text_of(i) for i in sample.history], catalogue.text_of(sample.target)
        )
        cut = len(encoded.input_ids) - encoded.num_target
        prompt, target = encoded.input_ids[:cut].tolist(), encoded.input_ids[cut:].tolist()
        edges = (
            np.flatnonzero((np.diff(encoded.segments[:cut]) != 0) | (np.diff(encoded.item_slot[:cut]) != 0))
            + 1
        )
        bounds = [0, *edges.tolist(), cut]
        masks = [(np.arange(cut) >= low) & (np.arange(cut) < high) for low, high in zip(bounds, bounds[1:])]
        rows, labels = attr.attribution_rows(prompt, target, masks, baseline, prefix=False)
        losses = [found[OBJECTIVE] for found in context.losses(rows, "example prompts", labels)]
        tokens = [
            {
                "text": tokenizer.decode(prompt[low:high]),
                "segment": SEGMENTS[encoded.segments[low]],
                "weight": float(weight),
            }
            for low, high, weight in zip(bounds, bounds[1:], attr.effects_of(losses).sum(axis=1))
        ]
        tokens.append({"text": tokenizer.decode(target), "segment": "target"})
        prompts.append(
            {
                "title": f"user {sample.user_id}: log-probability of the target, {-losses[0].sum():.1f} nats",
                "tokens": tokens,
            }
        )
    return prompts


def run(context: AuditContext) -> dict:
    samples, options = context.users(DEFAULT_USERS), context.options
    found = attr.attribute(context, samples, OBJECTIVE)
    settings = {"num_bootstrap": options.num_bootstrap, "seed": options.seed}
    mine = measure(found, **settings)
    swapped = attr.attribute(
        context,
        [replace(s, history=samples[p].history) for s, p in zip(samples, partners(samples, 1))],
        OBJECTIVE,
        what="control: swapped histories",
    )
    control = measure(swapped, **settings)
    models, measures = {"this model": mine, "control: swapped histories": control}, dict(mine)
    before_after = ""
    if context.has_adapter:
        before = attr.attribute(context.base(), samples, OBJECTIVE, what="attribution of the base model")
        models = {"base model": measure(before, **settings), **models}
        measures["ratio after / before tuning"] = change(before, found, **settings)
        before_after = (
            f"; before tuning {models['base model']['auxiliary:interaction'].value:.3g}, "
            f"after / before {measures['ratio after / before tuning'].text()}"
        )
    ratio, verdict = mine["auxiliary:interaction"], mine["log2 ratio"]
    words = (
        "auxiliary tokens weigh more"
        if verdict.low > 0
        else "neither side is shown to weigh more"
        if verdict.spans_null
        else "the history weighs more"
    )
    finding = f"Auxiliary to interaction attribution is {ratio.text()} over {ratio.n} users ({words}){before_after}."
    nll = np.array([a.loss.sum() for a in found])
    group_rows, group_note = _relevance(context, samples, nll, measures, settings)
    columns = [
        "model",
        *(f"share: {p}" for p in attr.PARTS),
        *(f"nats per token: {p}" for p in attr.PARTS),
        "auxiliary:interaction",
        "low",
        "high",
    ]
    rows = [
        [
            name,
            *(m[f"share: {p}"].value for p in attr.PARTS),
            *(m[f"density: {p}"].value for p in attr.PARTS),
            m["auxiliary:interaction"].value,
            m["auxiliary:interaction"].low,
            m["auxiliary:interaction"].high,
        ]
        for name, m in models.items()
    ]
    figures = [
        {
            "kind": "bar",
            "title": "What the target's log-probability hangs on",
            "stacked": True,
            "percent": True,
            "categories": list(models),
            "caption": "Shares of feature-ablation attribution; the history is the only part that differs between users.",
            "series": [
                {"name": part, "values": [m[f"share: {part}"].value for m in models.values()]}
                for part in attr.PARTS
            ],
        },
        {
            "kind": "tokens",
            "title": "Where the target's probability comes from",
            "prompts": example_prompts(context, samples[:EXAMPLES]),
            "caption": "Each piece is ablated alone; warm raises the target's probability, cool lowers it.",
        },
    ]
    if group_rows:
        figures.append(
            {
                "kind": "bar",
                "title": "Target NLL by relevance group",
                "x_label": "group 0 is least tied to the prompt's own words",
                "y_label": "nats",
                "legend": False,
                "caption": "Unequal bars are unequal service: low groups are titles that the prompt alone does not predict.",
                "categories": [r[0] for r in group_rows],
                "series": [
                    {
                        "name": "NLL",
                        "values": [r[2] for r in group_rows],
                        "low": [r[3] for r in group_rows],
                        "high": [r[4] for r in group_rows],
                    }
                ],
            }
        )
    return result(
        TITLE,
        QUESTION,
        finding=finding + group_note,
        effect=verdict,
        effect_name="log2 of auxiliary:interaction",
        better="lower",
        speaks=verdict.low > 0,
        control=f"with another user's history in place, the ratio is {control['auxiliary:interaction'].text()}: the part of the history's "
        "attribution that any text in its place would get",
        measures=measures,
        table={"columns": columns, "rows": rows},
        figures=figures,
        relevance_groups={
            "columns": ["group", "users", "NLL", "low", "high", "NDCG@10", "low", "high"],
            "rows": group_rows,
        },
    )


def _relevance(
    context: AuditContext, samples, nll: np.ndarray, measures: dict, settings: dict
) -> tuple[list, str]:
    if context.subject.group_of_entry is None:
        return [], " Relevance groups: the run has no relevance table."
    targets = context.targets(samples)
    scores = context.scores([s.history for s in samples], "catalogue scores")
    rows, spread = group_table(
        context.subject.group_of_entry[targets],
        -scores[np.arange(len(targets)), targets],
        ndcg(target_ranks(scores, targets)),
        **settings,
    )
    measures |= spread
    return (
        rows,
        f" Over relevance groups the worst NLL is {spread['worst group NLL'].text()}, the gap {spread['relevance group NLL gap'].text()}.",
    )


def cost(context: AuditContext) -> Cost:
    users = context.num_users(DEFAULT_USERS)
    passes = (len(attr.PARTS) + 1) * users * (3 if context.has_adapter else 2) + EXAMPLES * 20
    return Cost(
        losses=passes,
        scorings=context.unscored(DEFAULT_USERS) if context.subject.group_of_entry is not None else 0,
    )


AUDIT = Audit("language", TITLE, QUESTION, run, cost)
