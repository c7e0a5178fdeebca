"""Audit `history_length`: what do the older items of a history add?

The catalogue is scored behind the last 1, 2, 5 and 10 items of each user's history and behind the whole of
it, with the same users and targets. So the figures differ by the history's length alone, which slices by
length cannot show where all test histories have one length. Evaluation sees the longest histories; training
with growing windows sees all lengths.

    d_1 = NLL(y_u | last item) - NLL(y_u | all of h_u)       mean over users, in nats

The audit speaks when d_1 is not shown to be above zero: the model uses no item before the last. Control: the
same difference on another user's histories, d_1 of (y_u, h_v). It shows what the length of a prompt does by
itself, and its expectation is zero where length does nothing.

Shapes: U users, I catalogue entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eval.audit.base import Audit, Cost, Lack, result
from eval.audit.context import AuditContext
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.partners import partner_note, partners
from eval.audit.score_rows import probabilities, target_gains
from eval.audit.target_loss import target_nll
from gdrt_ds.data.corpus import Sample

DEFAULT_USERS = 64
LENGTHS = (1, 2, 5, 10)
WHOLE = "all"
EFFECT = "NLL, last 1 - all"
CONTROL = "control: another user's history, NLL, last 1 - all"


def shortest_history(context: AuditContext) -> int:
    """Items that a chosen user's history has at least: 10, or the median where histories are shorter."""
    lengths = [len(sample.history) for sample in context.subject.samples]
    return min(LENGTHS[-1], int(np.median(lengths)))


def chosen(context: AuditContext) -> list[Sample]:
    """Users whose histories are long enough for every length that is compared."""
    least = shortest_history(context)
    return context.users(DEFAULT_USERS, lambda sample: len(sample.history) >= least)


def lengths_of(samples: list[Sample]) -> list[int]:
    """Those of LENGTHS that every history has, and that shorten at least one."""
    lengths = [len(sample.history) for sample in samples]
    return [k for k in LENGTHS if k <= min(lengths) and k < max(lengths)]


def measure(
    scores: Mapping[str, np.ndarray],
    targets: np.ndarray,
    other_nll: Mapping[str, np.ndarray],
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Figures by length, and paired differences to the whole history.

    Args:
        scores: log-probabilities [U, I] by length, "1" first and WHOLE last.
        targets: entry indices [U].
        other_nll: [U] of "1" and WHOLE behind another user's history.
    """
    settings = {"num": num_bootstrap, "seed": seed}
    users = np.arange(len(targets))
    nll = {k: -np.log(probabilities(rows)[users, targets]) for k, rows in scores.items()}
    gain = {k: target_gains(rows, targets) for k, rows in scores.items()}
    found: dict[str, Estimate] = {}
    for k in scores:
        found[f"NDCG@10, {_words(k)}"] = bootstrap(gain[k], null=None, **settings)
        found[f"NLL, {_words(k)}"] = bootstrap(nll[k], null=None, **settings)
    for k in scores:
        if k != WHOLE:
            found[f"NDCG@10, {_words(k)} - all"] = bootstrap(gain[k] - gain[WHOLE], **settings)
            found[f"NLL, {_words(k)} - all"] = bootstrap(nll[k] - nll[WHOLE], **settings)
    found[CONTROL] = bootstrap(other_nll["1"] - other_nll[WHOLE], **settings)
    return found


def _words(length: str) -> str:
    return length if length == WHOLE else f"last {length}"


def run(context: AuditContext) -> dict:
    samples = chosen(context)
    cuts = {str(k): k for k in lengths_of(samples)}
    targets = context.targets(samples)
    scores = {
        name: context.scores([s.history[-k:] for s in samples], f"the last {k} of each history")
        for name, k in cuts.items()
    }
    scores[WHOLE] = context.scores([s.history for s in samples], "catalogue scores")
    found = measure(
        scores,
        targets,
        _losses_of_others(context, samples, targets),
        context.options.num_bootstrap,
        context.options.seed,
    )
    effect = found[EFFECT]
    fewest = min(len(s.history) for s in samples)
    return result(
        finding=(
            f"With the last item alone the target's NLL is {in_words(effect)} nats than with the "
            f"whole history (at least {fewest} items) over {effect.n} users; NDCG@10 changes by "
            f"{found['NDCG@10, last 1 - all'].text()}." + partner_note(samples)
        ),
        control=f"another user's history, last item against all: {found[CONTROL].text()} nats",
        effect=effect,
        effect_name="NLL(last item) - NLL(whole history), nats",
        better="higher",
        speaks=effect.not_above_null,
        measures=found,
        table=table(found, [*scores]),
        figures=[figure(found, [*scores], "NLL", "nats"), figure(found, [*scores], "NDCG@10", "NDCG@10")],
    )


def in_words(effect: Estimate) -> str:
    """`higher by 0.3 [0.2, 0.4]`, and `lower by` the turned figure where the effect is negative."""
    if effect.value < 0:
        return f"lower by {Estimate(-effect.value, -effect.high, -effect.low, effect.n, 0.0).text()}"
    return f"higher by {effect.text()}"


def _losses_of_others(
    context: AuditContext, samples: list[Sample], targets: np.ndarray
) -> dict[str, np.ndarray]:
    """NLL [U] of the own target behind another user's last item and behind their whole history."""
    others = [samples[partner].history for partner in partners(samples, 1)]
    prompts = [context.recommender.prompt_of(history[-1:]) for history in others]
    prompts += [context.recommender.prompt_of(history) for history in others]
    losses = target_nll(context, prompts, np.tile(targets, 2), "other users' histories").renormalised
    return {"1": losses[: len(samples)], WHOLE: losses[len(samples) :]}


def table(found: dict[str, Estimate], lengths: list[str]) -> dict:
    """One row per length, with both figures and their intervals."""
    rows = []
    for length in lengths:
        row: list = [_words(length)]
        for figure_name in ("NDCG@10", "NLL"):
            e = found[f"{figure_name}, {_words(length)}"]
            row += [e.value, e.low, e.high]
        rows.append(row)
    return {"columns": ["items of the history", "NDCG@10", "low", "high", "NLL", "low", "high"], "rows": rows}


def figure(found: dict[str, Estimate], lengths: list[str], measured: str, unit: str) -> dict:
    estimates = [found[f"{measured}, {_words(length)}"] for length in lengths]
    return {
        "kind": "bar",
        "title": f"{measured} by items of the history",
        "y_label": unit,
        "legend": False,
        "caption": "The same users with the last items of their histories: where the bars are level, older "
        "items add nothing.",
        "categories": [_words(length) for length in lengths],
        "series": [
            {
                "name": measured,
                "values": [e.value for e in estimates],
                "low": [e.low for e in estimates],
                "high": [e.high for e in estimates],
            }
        ],
    }


def cost(context: AuditContext) -> Cost:
    samples = chosen(context)
    shortened = len(samples) * len(lengths_of(samples))
    return Cost(scorings=shortened + context.unscored(DEFAULT_USERS), losses=2 * len(samples))


def lacks(context: AuditContext) -> Lack:
    if shortest_history(context) >= 2:
        return None
    return (
        "most histories have fewer than 2 items, so there is nothing to shorten",
        "evaluate a split with longer histories (data.history_length)",
    )


AUDIT = Audit(
    title="History length",
    question="What do the older items of a history add?",
    run=run,
    cost=cost,
    order=15,
    lacks=lacks,
)
