"""Audit `sensitivity` of rows: does the model read the evidence?

NLL of the completion behind the true prompt, behind the auxiliary prompt (the prompt without its evidence),
behind another row's prompt, and behind a blank one. A model that uses its evidence pays when it is taken
away or swapped. Control: a second other row's prompt against the first one's, whose expectation is zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eval.audit.base import estimate_series, result
from eval.audit.context import TooFewUsers, few_users_fix
from eval.audit.estimates import Estimate, bootstrap
from eval.audit.options import AuditOptions
from eval.rows.scoring import RowScorer
from eval.rows.subject import RowSubject
from gdrt_ds.data.text_rows import Prompt, TextRow
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.files import finite
from gdrt_ds.runtime import Runtime

NAME = "sensitivity"
DEFAULT_USERS = 64
RING_SEED = 11  # of the ring in which partners are looked for: the same for every model
TRUE, ABLATED, SWAPPED, BLANK = "true prompt", "without evidence", "another row's prompt", "blank prompt"
SECOND = "second swap"
WORDS = {f"{ABLATED} - true": "the auxiliary prompt", f"{SWAPPED} - true": "another row's prompt"}
CONTROL = "control: second swap - swapped"


def choose(names: list[str]) -> bool:
    """Whether the audit is to run.

    Raises:
        UserError: an audit that is about catalogues, or an unknown name.
    """
    from eval.audit.running import ALL, audits

    for name in names:
        if name in (NAME, ALL):
            continue
        if name in audits():
            raise UserError(
                f"--audit {name}: it is about lists or histories of a catalogue, and this run is on rows of "
                "prompt and completion",
                f"--audit {NAME} takes away, swaps and blanks the evidence of rows",
            )
        raise UserError(f"--audit {name}: there is no such audit", nearest(name, [NAME, ALL]))
    return bool(names)


def can_run(subject: RowSubject, names: Sequence[str], say: Callable[[str], None]) -> bool:
    """Whether there are rows of two users; `all` leaves the audit out where there are not.

    Raises:
        TooFewUsers: the audit was asked for by name.
    """
    try:
        one_row_per_user(subject.rows, DEFAULT_USERS, subject.limit)
    except TooFewUsers as error:
        if NAME in names:
            raise
        say(f"left out of `all`: {error.problem} ({error.fix})")
        return False
    return True


def one_row_per_user(rows: list[TextRow], most: int, limit: int | None = None) -> list[TextRow]:
    """At most `most` rows of different users, the same for every model, in the split's order.

    Args:
        limit: that of the evaluation, for the fix.
    Raises:
        TooFewUsers: fewer than two users.
    """
    first: dict[str, TextRow] = {}
    for row in rows:
        first.setdefault(row.user_id, row)
    independent = list(first.values())
    if len(independent) < 2:
        raise TooFewUsers(
            f"--audit {NAME}: {len(independent)} user(s), and prompts are swapped between users",
            few_users_fix(limit),
        )
    if len(independent) <= most:
        return independent
    chosen = np.random.default_rng(0).choice(len(independent), size=most, replace=False)
    return [independent[index] for index in sorted(chosen.tolist())]


def partner(rows: list[TextRow], shift: int) -> list[TextRow]:
    """For every row another one, with another prompt where there is one."""
    order = np.random.default_rng(RING_SEED).permutation(len(rows)).tolist()
    place = {index: p for p, index in enumerate(order)}
    found = []
    for index, row in enumerate(rows):
        ring = [order[(place[index] + shift + step) % len(order)] for step in range(len(order))]
        others = [other for other in ring if other != index]
        different = [other for other in others if rows[other].prompt != row.prompt]
        found.append(rows[(different or others)[0]])
    return found


def variants(subject: RowSubject, rows: list[TextRow]) -> dict[str, list[Prompt]]:
    """The prompts of every variant. Without auxiliary prompts that variant is left out."""
    data = subject.data
    found: dict[str, list[Prompt]] = {TRUE: [row.prompt for row in rows]}
    if all(row.auxiliary is not None for row in rows):
        found[ABLATED] = [data.auxiliary_of(row) for row in rows]
    found[SWAPPED] = [other.prompt for other in partner(rows, 1)]
    found[BLANK] = [data.auxiliary_of(replace(row, auxiliary="")) for row in rows]
    found[SECOND] = [other.prompt for other in partner(rows, 1 + max(1, len(rows) // 2))]
    return found


def measure(nll: dict[str, np.ndarray], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """NLL [U] per variant -> means, and paired differences to the true prompt."""
    settings = {"num": num_bootstrap, "seed": seed}
    found = {name: bootstrap(values, null=None, **settings) for name, values in nll.items()}
    for name in (ABLATED, SWAPPED, BLANK):
        if name in nll:
            found[f"{name} - true"] = bootstrap(nll[name] - nll[TRUE], **settings)
    found[CONTROL] = bootstrap(nll[SECOND] - nll[SWAPPED], **settings)
    return found


def run(
    subject: RowSubject, runtime: Runtime, options: AuditOptions, progress: Callable[[str], None]
) -> dict[str, Any]:
    """The audit's result, the same on every rank; its form is that of eval/audit/base.py."""
    started = time.time()
    rows = one_row_per_user(subject.rows, options.users or DEFAULT_USERS, subject.limit)
    prompts = variants(subject, rows)
    passes = len(prompts) * len(rows)
    progress(f"audit {NAME}: {passes} passes over prompt and completion")
    nll = _losses(subject, runtime, rows, prompts)
    found = measure(nll, options.num_bootstrap, options.seed)
    headline = f"{ABLATED if ABLATED in nll else SWAPPED} - true"
    effect = found[headline]
    others = [name for name in found if name.endswith(" - true") and name != headline]
    rest = [f"{name}: {found[name].text()}" for name in others]
    finding = (
        f"The completion's NLL changes by {effect.text()} "
        f"nats with {WORDS[headline]} over {effect.n} rows ({verdict(effect)}); {', '.join(rest)}."
    )
    answer = result(
        finding=finding,
        control=f"two wrong prompts against each other: {found[CONTROL].text()} nats, expected 0",
        effect=effect,
        effect_name=f"NLL({headline.removesuffix(' - true')}) - NLL(true), nats",
        better="higher",
        speaks=effect.not_above_null,
        measures=found,
        table={
            "columns": ["prompt", "NLL of the completion", "low", "high"],
            "rows": [[name, one.value, one.low, one.high] for name, one in found.items()],
        },
        figures=[figure(found)],
    )
    head = {
        "title": "Evidence",
        "question": "Does the model read the evidence in the prompt, or does the rest decide?",
    }
    seconds = time.time() - started
    cost = f"{passes} passes; took {seconds:.0f} s on {runtime.world} rank(s) of {runtime.device.type}"
    progress(f"  {finding}")
    return finite({**head, **answer, "cost": cost})


def _losses(
    subject: RowSubject, runtime: Runtime, rows: list[TextRow], prompts: dict[str, list[Prompt]]
) -> dict[str, np.ndarray]:
    """NLL of each completion behind each variant, float64 [U]; ranks take turns over the rows."""
    scorer = RowScorer(subject.model)
    encoder = subject.model.encoder
    table = torch.zeros(len(prompts), len(rows), dtype=torch.float64)
    mine = list(range(runtime.rank, len(rows), runtime.world))
    for place, variant in enumerate(prompts.values()):
        encoded = [encoder.encode(rows[index], prompt=variant[index]) for index in mine]
        for index, scored in zip(mine, scorer.score(encoded, with_curves=False), strict=True):
            table[place, index] = float(scored.losses.sum())
    if runtime.world > 1:
        table = table.to(runtime.device)
        dist.all_reduce(table)
    return dict(zip(prompts, table.cpu().numpy(), strict=True))


def verdict(effect: Estimate) -> str:
    if effect.low > 0:
        return "the evidence is read"
    if effect.spans_null:
        return "no use of the evidence is shown"
    return "the evidence misleads"


def figure(found: dict[str, Estimate]) -> dict[str, Any]:
    bars = [name for name in found if name.endswith(" - true") or name == CONTROL]
    return {
        "kind": "bar",
        "title": "What the completion's NLL pays without its evidence",
        "horizontal": True,
        "y_label": "nats above the true prompt",
        "legend": False,
        "caption": "A bar away from zero is evidence that the model uses; the control compares two wrong "
        "prompts.",
        "categories": bars,
        "series": [estimate_series("NLL difference", [found[bar] for bar in bars])],
    }
