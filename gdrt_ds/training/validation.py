"""Plain losses of the validation split by group, and which validation was the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gdrt_ds import dro
from gdrt_ds.batches import MicroBatch
from gdrt_ds.config import DroSection
from gdrt_ds.data.token_facts import whole
from gdrt_ds.dro.groups import UNSEEN
from gdrt_ds.loss import AllowedTokens, group_sums
from gdrt_ds.objectives import get_objective
from gdrt_ds.training.grouping import Grouped
from gdrt_ds.training.job import Job
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.losses import split_losses
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.step_inputs import InTrie, allowed_tokens, next_tokens


@dataclass(frozen=True)
class Validation:
    """One validation in nats per target token.

    The mean, the worst group's, F of the group losses, and float64[G]; and in nats per title, the loss of the
    target among all titles of the catalogue, None where it is not measured (`TitleLosses`).
    """

    step: int
    nll: float
    worst_group: float
    objective: float
    group_loss: torch.Tensor
    catalogue_nll: float | None = None

    @property
    def is_finite(self) -> bool:
        """False if any token's loss is NaN or infinite: such a model cannot be compared with another."""
        return all(math.isfinite(value) for value in self.figures().values())

    def figures(self) -> dict[str, float]:
        found = {"nll": self.nll, "worst_group": self.worst_group, "objective": self.objective}
        return found if self.catalogue_nll is None else {**found, "catalogue_nll": self.catalogue_nll}


@dataclass(frozen=True)
class Best:
    """The best validation as checkpoints store it (step, value, figures), and how many came after it."""

    figures: dict[str, Any] | None = None
    later: int = 0

    def is_beaten_by(self, validation: Validation, select_by: str) -> bool:
        """A validation that is not finite beats nothing, the first one included."""
        if not validation.is_finite:
            return False
        return self.figures is None or validation.figures()[select_by] < self.figures["value"]

    def is_given_up(self, patience: int | None) -> bool:
        """Whether so many validations came after the best one that train.patience ends the run."""
        return patience is not None and self.later >= patience

    def after(self, validation: Validation, select_by: str) -> Best:
        """The best once `validation` is counted; `select_by`: a name of its figures."""
        if not self.is_beaten_by(validation, select_by):
            return Best(self.figures, self.later + 1)
        value = validation.figures()[select_by]
        return Best({"step": validation.step, "value": value, **validation.figures()}, 0)


class TitleLosses:
    """Losses of the validation targets among the titles of the catalogue: what a ranking of titles sees.

    The plain loss also pays for tokens that no title has there. An objective with a masked softmax does not
    train that, so its plain loss says little about it. This loss takes a pass of its own, so it is measured
    for such objectives, and where `train.select_by=catalogue_nll` asks for it.
    """

    def __init__(self, prepared: Prepared):
        in_trie = InTrie.of(prepared, "valid")
        self.node = in_trie.node
        self.offsets, self.tokens = next_tokens(in_trie.trie)

    @classmethod
    def of(cls, job: Job, prepared: Prepared) -> TitleLosses | None:
        """None where they are not measured."""
        masked = get_objective(job.config.objective).masked_softmax
        wanted = masked or job.config.train.select_by == "catalogue_nll"
        if not wanted or prepared.data.catalogue is None or "valid" not in prepared.stores:
            return None
        return cls(prepared)

    def allowed(self, micro: MicroBatch) -> AllowedTokens:
        return allowed_tokens(self.node, self.offsets, self.tokens, micro)

    def mean(self, job: Job, prepared: Prepared, loaded: Loaded, beat: Callable[[], None]) -> float:
        """Nats per title."""
        losses = split_losses(job, prepared, loaded, "valid", beat=beat, allowed_of=self.allowed)
        return float(losses.sum() / len(prepared.stores["valid"]))


def validate(
    job: Job,
    prepared: Prepared,
    loaded: Loaded,
    grouped: Grouped,
    step: int,
    beat: Callable[[], None],
    titles: TitleLosses | None = None,
) -> Validation:
    """Scores the validation split after `step` steps. Every rank calls it and gets the same."""
    loaded.engine.eval()
    losses = torch.from_numpy(split_losses(job, prepared, loaded, "valid", beat=beat))
    catalogue_nll = None if titles is None else titles.mean(job, prepared, loaded, beat)
    loaded.engine.train()
    groups = torch.from_numpy(whole(grouped.groups["valid"]).astype(np.int64))
    group_loss, worst, objective = by_group(losses, groups, grouped.plan.num, job.config.dro)
    return Validation(
        step=step,
        nll=losses.mean().item(),
        worst_group=worst,
        objective=objective,
        group_loss=group_loss,
        catalogue_nll=catalogue_nll,
    )


def by_group(
    losses: torch.Tensor, groups: torch.Tensor, num: int, section: DroSection
) -> tuple[torch.Tensor, float, float]:
    """Losses of groups, the worst of them, and F of them.

    Args:
        losses: float64[N], of target tokens.
        groups: Long[N]; UNSEEN is no group, since training has no weight for it.

    Returns:
        float64[num] with NaN for a group without tokens, and the two figures.
    """
    known = groups != UNSEEN
    losses, groups = losses[known], groups[known]
    counts = torch.bincount(groups, minlength=num).double()
    group_loss = group_sums(losses, groups, num) / counts.clamp_min(1)
    group_loss[counts == 0] = float("nan")
    present = torch.where(counts > 0, group_loss, 0.0)  # NaN of a group that is there stays NaN
    _, objective = dro.closed_form_weights(present, dro.prior(counts, section.prior), section.tau)
    return group_loss, group_loss[counts > 0].max().item(), objective.item()
