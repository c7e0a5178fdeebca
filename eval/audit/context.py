"""What an audit may ask for: a sample of users, scores of histories, losses of targets, the base model.

An audit is a measurement (numbers in, numbers out, pure numpy) behind model passes that all go through
`AuditContext`: batched, split over ranks, with progress. A context whose `score_batch` is a formula with a
known bias tests the measurement (tests/eval/planted_context.py).

Shapes: B prompts, U users, I catalogue entries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist

from eval.audit.options import DEFAULT_OPTIONS, AuditOptions
from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError

MOST_USERS = 100  # the largest default of an audit over score rows
TARGETS_TOGETHER = 8  # behind one prompt; more would widen the attention of every prompt of a batch
PROGRESS_S = 15  # seconds between two lines of progress

History = tuple[str, ...]
"""Item ids, oldest first."""


class TooFewUsers(UserError):
    """An audit compares users, and there are not two of them. `--audit all` leaves such an audit out."""


def few_users_fix(limit: int | None) -> str:
    """What gives an audit more users.

    Args:
        limit: of the evaluation; None where it takes the whole split.
    """
    if limit:
        return f"raise --limit (it is {limit}), or leave it out"
    return "choose another split"


def any_sample(sample: Sample) -> bool:
    return True


class AuditContext:
    """The subject of an audit with everything it may ask for.

    Args:
        subject: `eval.loading.Subject`.
        runtime: of this process.
        options: settings that audits share.
    """

    def __init__(self, subject, runtime, options: AuditOptions = DEFAULT_OPTIONS):
        self.subject = subject
        self.runtime = runtime
        self.options = options
        self._rows: dict[History, np.ndarray] = {}  # scores [I] by history
        self._base: AuditContext | None = None
        self._scorer = None

    # -- what is audited -------------------------------------------------------------------------------
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

    def users(self, default: int, where: Callable[[Sample], bool] = any_sample) -> list[Sample]:
        """One sample per user, so that samples are independent, in the split's order.

        The choice depends on the split and the seed alone: all audits with the same number see the same
            users.

        Args:
            default: most users, unless the option `users` says otherwise.
            where: which samples fit.
        Raises:
            TooFewUsers: fewer than two users.
        """
        wanted = self.options.users or default
        samples = [sample for sample in self.subject.samples if where(sample)]
        order = np.random.default_rng(self.options.seed).permutation(len(samples))
        first_of_user: dict[str, int] = {}
        for index in order.tolist():
            first_of_user.setdefault(samples[index].user_id, index)
        chosen = list(first_of_user.values())
        if len(chosen) < 2:
            raise TooFewUsers(
                f"it has {len(chosen)} user(s) of the {self.subject.split} split to look at, and needs at "
                "least 2",
                few_users_fix(self.subject.limit),
            )
        return [samples[index] for index in sorted(chosen[:wanted])]

    def num_users(self, default: int) -> int:
        return len(self.users(default))

    def targets(self, samples: Sequence[Sample]) -> np.ndarray:
        """Entry index of every target, int64 [U]."""
        return np.array([self.catalogue.index_of[sample.target] for sample in samples], dtype=np.int64)

    def encoded(self, sample: Sample) -> tuple[list[int], list[int]]:
        """(prompt tokens, target tokens) of a sample."""
        encoder = self.recommender.encoder
        target = encoder.target_ids(self.catalogue.text_of(sample.target))
        return self.recommender.prompt_of(sample.history), list(target)

    # -- scores of histories ---------------------------------------------------------------------------
    def score_batch(self, histories: list[History]) -> np.ndarray:
        """Exact renormalised log-probabilities of the catalogue behind each history, float64 [B, I]."""
        return self.score_prompts([self.recommender.prompt_of(history) for history in histories])

    def score_prompts(self, prompts: list[list[int]]) -> np.ndarray:
        """The same for token lists that start with the constant prompt prefix."""
        from gdrt_ds.inference.catalogue_scoring import CatalogueScorer

        if self._scorer is None:
            bound = self.options.max_score_bytes
            self._scorer = CatalogueScorer(self.recommender.reader, self.recommender.trie, max_bytes=bound)
        return self._scorer.score(prompts).numpy()

    def scores(self, histories: Sequence[History], what: str) -> np.ndarray:
        """Scores of many histories, each computed once per context, float64 [B, I].

        Args:
            what: name of the passes in lines of progress.
        """
        keys = [tuple(history) for history in histories]
        missing = list(dict.fromkeys(key for key in keys if key not in self._rows))
        missing.sort(key=len)  # prompts of similar length share a batch
        rows = self.each(missing, lambda part: list(self.score_batch(part)), what, self.options.batch_size)
        self._rows.update(zip(missing, rows))
        return np.stack([self._rows[key] for key in keys])

    def matrix(self, default: int) -> tuple[list[Sample], np.ndarray]:
        """The users and their exact user x item matrix of log-probabilities, float64 [U, I]."""
        samples = self.users(default)
        return samples, self.scores([sample.history for sample in samples], "catalogue scores")

    def unscored(self, default: int) -> int:
        """Users of `matrix(default)` whose scores are still to be computed."""
        return len({tuple(sample.history) for sample in self.users(default)} - set(self._rows))

    def wanted_scores(self) -> frozenset[int]:
        """Ids of the samples whose scores audits are most likely to ask for.

        An evaluation that scores them anyway can hand them over (`remember`).
        """
        try:
            return frozenset(sample.sample_id for sample in self.users(MOST_USERS))
        except UserError:  # too few users: the audits that need them say so themselves
            return frozenset()

    def remember(self, scores: dict[History, np.ndarray]) -> None:
        """Takes scores [I] by history from all ranks, so that no audit computes them again."""
        parts: list[Any] = [scores]
        if self.runtime.world > 1:
            parts = [None] * self.runtime.world
            dist.all_gather_object(parts, scores)
        for part in parts:
            self._rows.update(part)

    def forget(self) -> None:
        """Drops what was computed (call after the model's weights changed)."""
        self._rows = {}
        self._scorer = None

    # -- losses of targets -----------------------------------------------------------------------------
    def loss_batch(
        self, rows: list[tuple[list[int], list[int]]], labels: list[list[int]], full_only: bool = False
    ) -> list[dict[str, np.ndarray]]:
        """Losses per target token of one batch; see eval.audit.target_loss.

        Args:
            rows: (prompt tokens, fed target tokens).
            labels: the true targets.
            full_only: leave `renormalised` out.
        """
        from eval.audit.target_loss import token_losses

        trie = None if full_only else self.recommender.trie
        return token_losses(self.recommender.reader, trie, rows, labels)

    def losses(
        self,
        rows: Sequence[tuple[list[int], list[int]]],
        what: str,
        labels: Sequence[list[int]] | None = None,
        full_only: bool = False,
    ) -> list[dict[str, np.ndarray]]:
        """`loss_batch` over many rows, similar lengths together.

        Equal rows are computed once, and rows with one prompt together.

        Args:
            rows: (prompt tokens, target tokens fed).
            what: name of the passes in lines of progress.
            labels: the true targets, where they differ from what is fed.
            full_only: leave `renormalised` out (targets that are no whole catalogue entries).
        Returns:
            per row {"full", "renormalised"}: float64 [target tokens], nats.
        """
        if labels is None:
            labels = [target for _, target in rows]
        keys = [(tuple(prompt), tuple(target), tuple(label)) for (prompt, target), label in zip(rows, labels)]
        distinct = sorted(dict.fromkeys(keys))

        behind: dict[tuple[int, ...], list] = {}
        for key in distinct:
            behind.setdefault(key[0], []).append(key)
        together = [
            members[start : start + TARGETS_TOGETHER]
            for members in behind.values()
            for start in range(0, len(members), TARGETS_TOGETHER)
        ]
        together.sort(key=lambda part: len(part[0][0]) + sum(len(target) for _, target, _ in part))

        def compute(part):
            flat = [key for members in part for key in members]
            fed = [(list(prompt), list(target)) for prompt, target, _ in flat]
            losses = iter(self.loss_batch(fed, [list(label) for _, _, label in flat], full_only))
            return [[next(losses) for _ in members] for members in part]

        computed = self.each(together, compute, what, self.options.batch_size)
        found = {
            key: losses
            for members, all_losses in zip(together, computed)
            for key, losses in zip(members, all_losses)
        }
        return [found[key] for key in keys]

    def title_log_probs(self, which: str) -> np.ndarray:
        """Log-probability of every title under a content-free prompt, float64 [I].

        Args:
            which: `base`, or `random` (the same architecture, initialised anew).
        """
        from eval.audit.title_prior import title_log_probs

        return title_log_probs(self, which)

    def each(self, items: list, compute: Callable[[list], list], what: str, batch: int) -> list:
        """`compute` over batches of items, split over ranks. Every rank gets all results, in order."""
        rank = self.runtime.rank
        world = self.runtime.world
        mine = items[rank::world]
        results: list = []
        started = time.time()
        told = started
        for start in range(0, len(mine), batch):
            results += compute(mine[start : start + batch])
            if self.runtime.is_main and time.time() - told > PROGRESS_S:
                told = time.time()
                left = (told - started) / len(results) * (len(mine) - len(results))
                where = " on this rank" if world > 1 else ""
                print(f"  {what}: {len(results)}/{len(mine)}{where}, {left:.0f} s left", flush=True)
        if world == 1:
            return results
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, results)
        return [parts[i % world][i // world] for i in range(len(items))]

    # -- other models ----------------------------------------------------------------------------------
    @property
    def has_adapter(self) -> bool:
        return self.recommender.adapter is not None

    def base(self) -> AuditContext:
        """The base model under the same prompt, catalogue and users; this context if there is no adapter."""
        if not self.has_adapter:
            return self
        if self._base is None:
            subject = replace(
                self.subject, recommender=self.variant(adapter=None), name=f"{self.subject.name} (base)"
            )
            self._base = AuditContext(subject, self.runtime, self.options)
        return self._base

    def variant(self, adapter, merge: bool = True):
        """Another Recommender with this one's base model, prompt and catalogue.

        Args:
            adapter: folder of its adapter, or None for the base model.
            merge: whether the adapter's weights are added to the base's.
        """
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
            mine.as_loaded,
        )
