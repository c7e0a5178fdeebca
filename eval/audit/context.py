"""What an audit may ask for: scores of histories, losses of targets, the base model, a sample of users; and what it returns.

An audit is a measurement (numbers in, numbers out, pure numpy) behind model passes that all go through `AuditContext`: batched, split
over ranks, with progress. A context whose `score_batch` is a function with a known bias tests the measurement (tests/eval/planted.py).

Shapes: B prompts, U users, I catalogue entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError

NLL_BATCH, SCORE_BATCH = 8, 8
MOST_USERS = 100  # the largest default of an audit over score rows


@dataclass(frozen=True)
class AuditOptions:
    """Settings that audits share.

    Attributes:
        users: users looked at; None = the audit's own default.
        permutations: histories tried per user (position), permuted labels (controls) are 200.
        runs: other run or evaluation folders, for audits over several of them.
        num_bootstrap: resamples of the intervals. seed: of samples, permutations and resamples.
    """

    users: int | None = None
    permutations: int = 8
    runs: tuple[str, ...] = ()
    num_bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """Model passes an audit is going to make: exact catalogue scorings, target losses, and passes of fixed length in `tokens`."""

    scorings: int = 0
    losses: int = 0
    tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class Audit:
    """One row of the registry.

    Attributes:
        run: does it all and returns an audit of results.json (see eval.report), with `effect`: the one number that stands for
            it, `speaks`: whether its interval excludes the null value, and `measures`: all its estimates by name.
        cost: what `run` is going to cost.
        lacks: None if it can run here, else what is missing (problem, fix).
    """

    name: str
    title: str
    question: str
    run: Callable[[AuditContext], dict[str, Any]]
    cost: Callable[[AuditContext], Cost]
    lacks: Callable[[AuditContext], tuple[str, str] | None] = lambda context: None


def result(
    audit_title: str,
    question: str,
    *,
    finding: str,
    control: str,
    effect,
    effect_name: str,
    speaks: bool,
    measures: dict[str, Any],
    table: dict[str, Any] | None = None,
    figures: Sequence[dict[str, Any]] = (),
    better: str | None = "null",
    **extra: Any,
) -> dict[str, Any]:
    """The dictionary of one finished audit.

    Args:
        measures: name -> Estimate.
        better: which way the effect improves: `null` (towards its null value), `higher`, `lower`, None = neither.
    """
    return {
        "title": audit_title,
        "question": question,
        "finding": finding,
        "table": table,
        "figures": list(figures),
        "control": control,
        "effect": {"name": effect_name, "better": better, **effect.as_dict()},
        "speaks": bool(speaks),
        "measures": {name: estimate.as_dict() for name, estimate in measures.items()},
        **extra,
    }


class AuditContext:
    """The subject of an audit with everything it may ask for.

    Args:
        subject: `eval.loading.Subject`. runtime: of this process.
    """

    def __init__(self, subject, runtime, options: AuditOptions = AuditOptions()):
        self.subject, self.runtime, self.options = subject, runtime, options
        self._rows: dict[tuple[str, ...], np.ndarray] = {}  # scores by history
        self._base: AuditContext | None = None
        self._scorer = None
        self._seconds: dict[str, float] = {}

    # -- what is audited ---------------------------------------------------------------------------------------------------
    @property
    def recommender(self):
        return self.subject.recommender

    @property
    def catalogue(self):
        return self.subject.catalogue

    @property
    def popularity(self) -> np.ndarray:
        """Train interactions per entry, float64 [I]."""
        return np.array([entry.train_count for entry in self.catalogue.entries], dtype=np.float64)

    def users(self, default: int, where: Callable[[Sample], bool] = lambda sample: True) -> list[Sample]:
        """One sample per user (so that samples are independent) among those that fit, in the split's order; at most `users` or `default`.

        The choice depends on the split and the seed alone: all audits with the same number see the same users.
        """
        wanted = self.options.users or default
        if wanted < 2:
            raise UserError(f"--audit-users {wanted} leaves nothing to compare", "give at least 2")
        samples = [s for s in self.subject.samples if where(s)]
        order = np.random.default_rng(self.options.seed).permutation(len(samples))
        seen: set[str] = set()
        chosen = [
            i for i in order.tolist() if not (samples[i].user_id in seen or seen.add(samples[i].user_id))
        ]
        if len(chosen) < 2:
            raise UserError(
                f"the {self.subject.split} split has {len(chosen)} user(s); an audit needs at least 2",
                "choose another split",
            )
        return [samples[i] for i in sorted(chosen[:wanted])]

    def num_users(self, default: int) -> int:
        return len(self.users(default))

    def targets(self, samples: Sequence[Sample]) -> np.ndarray:
        """Entry index of every target, int64 [U]."""
        return np.array([self.catalogue.index_of[s.target] for s in samples], dtype=np.int64)

    # -- model passes ------------------------------------------------------------------------------------------------------
    def score_batch(self, histories: list[tuple[str, ...]]) -> np.ndarray:
        """Item ids, oldest first -> exact renormalised log-probabilities of the catalogue, float64 [B, I]."""
        return self.score_prompts([self.recommender.prompt_of(history) for history in histories])

    def score_prompts(self, prompts: list[list[int]]) -> np.ndarray:
        """The same for token lists that start with the constant head."""
        from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

        if self._scorer is None:
            self._scorer = CatalogueScorer(self.recommender.reader, self.recommender.trie)
        return self._scorer.score(prompts).numpy()

    def loss_batch(
        self, rows: list[tuple[list[int], list[int]]], labels: list[list[int]], full_only: bool = False
    ) -> list[dict[str, np.ndarray]]:
        """(prompt tokens, fed target tokens) and true targets -> losses per target token; see eval.audit.target_loss."""
        from eval.audit.target_loss import token_losses

        return token_losses(
            self.recommender.reader, None if full_only else self.recommender.trie, rows, labels
        )

    def scores(self, histories: Sequence[tuple[str, ...]], what: str) -> np.ndarray:
        """Scores of many histories, each computed once per context. float64 [B, I]."""
        keys = [tuple(h) for h in histories]
        missing = list(dict.fromkeys(k for k in keys if k not in self._rows))
        missing.sort(key=len)
        for key, row in zip(
            missing, self.each(missing, lambda part: list(self.score_batch(part)), what, SCORE_BATCH)
        ):
            self._rows[key] = row
        return np.stack([self._rows[k] for k in keys])

    def wanted_scores(self) -> frozenset[int]:
        """Ids of the samples whose scores audits are most likely to ask for: an evaluation that scores them anyway can hand them over."""
        try:
            return frozenset(s.sample_id for s in self.users(MOST_USERS))
        except UserError:  # too few users: the audits that need them say so themselves
            return frozenset()

    def remember(self, scores: dict[tuple[str, ...], np.ndarray]) -> None:
        """Takes scores [I] by history from all ranks, so that no audit computes them again."""
        parts: list[Any] = [scores]
        if self.runtime.world > 1:
            parts = [None] * self.runtime.world
            dist.all_gather_object(parts, scores)
        for part in parts:
            self._rows.update(part)

    def unscored(self, default: int) -> int:
        """Users of `matrix(default)` whose scores are still to be computed."""
        return len({tuple(s.history) for s in self.users(default)} - set(self._rows))

    def matrix(self, default: int) -> tuple[list[Sample], np.ndarray]:
        """The users and their exact user x item matrix of log-probabilities, float64 [U, I]."""
        samples = self.users(default)
        return samples, self.scores([s.history for s in samples], "catalogue scores")

    def forget(self) -> None:
        """Drops what was computed (call after the model's weights changed)."""
        self._rows, self._scorer = {}, None

    def losses(
        self,
        rows: Sequence[tuple[list[int], list[int]]],
        what: str,
        labels: Sequence[list[int]] | None = None,
        full_only: bool = False,
    ) -> list[dict[str, np.ndarray]]:
        """`loss_batch` over many rows, similar lengths together; equal rows are computed once.

        Args:
            rows: (prompt tokens, target tokens fed). labels: the true targets, where they differ from what is fed.
            full_only: leave `renormalised` out (targets that are no whole catalogue entries).
        Returns:
            per row {"full", "renormalised"}: float64 [target tokens], nats.
        """
        labels = labels if labels is not None else [target for _, target in rows]
        keys = [(tuple(prompt), tuple(target), tuple(label)) for (prompt, target), label in zip(rows, labels)]
        distinct = sorted(dict.fromkeys(keys), key=lambda key: (len(key[0]) + len(key[1]), key))

        def compute(part):
            return self.loss_batch(
                [(list(p), list(t)) for p, t, _ in part], [list(label) for _, _, label in part], full_only
            )

        found = dict(zip(distinct, self.each(distinct, compute, what, NLL_BATCH)))
        return [found[key] for key in keys]

    def each(self, items: list, compute: Callable[[list], list], what: str, batch: int) -> list:
        """compute over batches of items, split over ranks; every rank gets all results in the items' order."""
        rank, world = self.runtime.rank, self.runtime.world
        mine, results, started, told = items[rank::world], [], time.time(), time.time()
        for start in range(0, len(mine), batch):
            results += compute(mine[start : start + batch])
            if self.runtime.is_main and time.time() - told > 15:
                told, spent = time.time(), time.time() - started
                print(
                    f"  {what}: {len(results)}/{len(mine)}{' on this rank' if world > 1 else ''}, "
                    f"{spent / len(results) * (len(mine) - len(results)):.0f} s left",
                    flush=True,
                )
        if world == 1:
            return results
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, results)
        return [parts[i % world][i // world] for i in range(len(items))]

    # -- other models ------------------------------------------------------------------------------------------------------
    @property
    def has_adapter(self) -> bool:
        return self.recommender.adapter is not None

    def base(self) -> AuditContext:
        """The base model under the same prompt, catalogue and users; this context itself if there is no adapter."""
        if not self.has_adapter:
            return self
        if self._base is None:
            self._base = AuditContext(
                replace(
                    self.subject, recommender=self.variant(adapter=None), name=f"{self.subject.name} (base)"
                ),
                self.runtime,
                self.options,
            )
        return self._base

    def variant(self, adapter, merge: bool = True):
        """Another Recommender with this one's base model, prompt and catalogue."""
        from gdrt_ds.inference.recommender import assemble

        mine = self.recommender
        return assemble(
            mine.config,
            self.runtime,
            mine.loaded.path,
            adapter,
            mine.encoder.template,
            mine.encoder.template.domain,
            mine.catalogue,
            merge,
        )

    def title_log_probs(self, which: str) -> np.ndarray:
        """Log-probability of every title under a content-free prompt, float64 [I]; `which`: base, or random (initialised anew)."""
        from eval.audit.title_prior import title_log_probs

        return title_log_probs(self, which)

    # -- cost --------------------------------------------------------------------------------------------------------------
    def seconds_of(self, cost: Cost) -> float:
        """Estimated seconds on all ranks together, from one timed pass of each kind, a single row: batches are faster."""
        sample = self.users(2)[:1]
        if cost.scorings and "score" not in self._seconds:
            self._seconds["score"] = self._timed(lambda: self.score_batch([s.history for s in sample]))
        if (cost.losses or cost.tokens) and "loss" not in self._seconds:
            prompt, target = self.encoded(sample[0])
            self._seconds["loss"] = self._timed(lambda: self.loss_batch([(prompt, target)], [target]))
            self._seconds["token"] = self._seconds["loss"] / (len(prompt) + len(target))
        spent = (
            cost.scorings * self._seconds.get("score", 0)
            + cost.losses * self._seconds.get("loss", 0)
            + cost.tokens * self._seconds.get("token", 0)
        )
        return spent / self.runtime.world

    def _timed(self, work: Callable[[], Any]) -> float:
        work()  # the first pass plans the catalogue and reads the prompt's constant head
        started = time.time()
        work()
        return time.time() - started

    def encoded(self, sample: Sample) -> tuple[list[int], list[int]]:
        """(prompt tokens, target tokens) of a sample."""
        encoder = self.recommender.encoder
        return self.recommender.prompt_of(sample.history), list(
            encoder.target_ids(self.catalogue.text_of(sample.target))
        )

    def describe_cost(self, cost: Cost) -> str:
        parts = [
            f"{cost.scorings} exact catalogue scorings" if cost.scorings else "",
            f"{cost.losses} passes over prompt and target" if cost.losses else "",
            f"{cost.tokens:,} tokens without history" if cost.tokens else "",
            cost.note,
        ]
        what = ", ".join(p for p in parts if p) or "no model passes"
        if not (cost.scorings or cost.losses or cost.tokens):
            return what
        return f"{what}; about {self.seconds_of(cost):.0f} s"
