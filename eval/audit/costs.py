"""What an audit is going to cost, in words and seconds: one pass of each kind is timed before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from eval.audit.base import Cost
from eval.audit.context import AuditContext


class CostEstimate:
    """Times model passes of a context, each kind at most once."""

    def __init__(self, context: AuditContext):
        self.context = context
        self._seconds: dict[str, float] = {}  # kind of pass -> seconds

    def describe(self, cost: Cost) -> str:
        """The passes and the estimated seconds in words."""
        parts = []
        if cost.scorings:
            parts.append(f"{cost.scorings} exact catalogue scorings")
        if cost.losses:
            parts.append(f"{cost.losses} passes over prompt and target")
        if cost.tokens:
            parts.append(f"{cost.tokens:,} tokens without history")
        with_model = bool(parts)
        if cost.note:
            parts.append(cost.note)
        what = ", ".join(parts) or "no model passes"
        if not with_model:
            return what
        return f"{what}; about {self.seconds(cost):.0f} s"

    def seconds(self, cost: Cost) -> float:
        """Estimated seconds on all ranks together. A single row is timed, and batches are faster."""
        context = self.context
        sample = context.users(2)[0]
        if cost.scorings and "score" not in self._seconds:
            self._seconds["score"] = _timed(lambda: context.score_batch([sample.history]))
        if (cost.losses or cost.tokens) and "loss" not in self._seconds:
            prompt, target = context.encoded(sample)
            self._seconds["loss"] = _timed(lambda: context.loss_batch([(prompt, target)], [target]))
            self._seconds["token"] = self._seconds["loss"] / (len(prompt) + len(target))
        spent = (
            cost.scorings * self._seconds.get("score", 0)
            + cost.losses * self._seconds.get("loss", 0)
            + cost.tokens * self._seconds.get("token", 0)
        )
        return spent / context.runtime.world


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of the second call: the first one plans the catalogue and reads the constant prompt prefix."""
    work()
    started = time.time()
    work()
    return time.time() - started
