"""What an objective is: a few small choices on shared parts.

The trainer, the fused loss and the all-reduce are the same for all. An objective is

    F = sum_g q_g L_g    with L_g = S_g / n_g, S_g = sum over tokens i of group g of w_i v_i, n_g = sum of w_i

    v_i   `token_term`: a differentiable function of the token losses (default: the loss itself)
    w_i   `token_weights`: fixed weights known from the data (default: 1), or
          `live_weights`: weights from this step's own scores, without gradient. Their sums n_g are known only
          after the step's all-reduce, so the backward waits for it.
    q     `aggregate`: group losses -> weights, or per-token weights when `per_token` is set

The softmax runs over the whole vocabulary, or over the catalogue trie's valid next tokens (`masked_softmax`).
`history_free_pass` asks for a second forward on the prompt without the history, for objectives that compare
the two. `top_k` asks for the K-th largest log-probability at each token.

To add one: a file in this folder with `OBJECTIVE = Objective(...)`, and a config that names it
(docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gdrt_ds import dro
from gdrt_ds.config import DroSection, ObjectiveOptions


@dataclass
class GroupView:
    """What an aggregation sees: reduced over all ranks and micro-batches of one optimizer step.

    Attributes:
        losses: float64[G], of this batch or moving averages (`dro.estimate`), minus the reference's if
            `dro.excess`;
            None when an aggregation that looks at no losses is asked before the forward.
        counts: float64[G] sums of token weights of this global batch.
        state: what the run remembers; only `Objective.remember` changes it.
    """

    losses: Tensor | None
    counts: Tensor
    state: dro.DroState
    dro: DroSection
    frozen_q: Tensor | None = None

    @property
    def present(self) -> Tensor:
        return self.counts > 0

    def prior(self) -> Tensor:
        return dro.prior(self.counts, self.dro.prior)


@dataclass
class TokenView:
    """What a token term sees: the supervised tokens of one micro-batch.

    Attributes:
        losses: float32[N], differentiable.
        counterfactual: float32[N], losses of the difference of hidden states with and without history, or
            None.
        top_k_log_probs: float32[N] without gradient, the K-th largest log-probability of the same softmax
            (the smallest where there are fewer than K), or None.
        num_choices: Long[N], tokens among which the masked softmax chooses, or None.
        position: Long[N], position inside the target title.
        length: Long[N], tokens of that title.
    """

    losses: Tensor
    position: Tensor
    length: Tensor
    options: ObjectiveOptions
    counterfactual: Tensor | None = None
    top_k_log_probs: Tensor | None = None
    num_choices: Tensor | None = None


@dataclass
class TokenTable:
    """Fixed facts of the target tokens of the train split, for `token_weights`.

    Tokens with the same facts stand there once: with a catalogue, there is a row for every token of every
    title, however often train has it; without one, a row for every target token. An average over the target
    tokens takes `counts` as its weights.

    Attributes:
        counts: int64, target tokens of train that have these facts. It may be 0.
        train_count: popularity of the target item; in data without a catalogue, train samples with the same
            completion.
        branching: bool, whether there is more than one valid next token at this place of the trie.
        valid_before: items still possible before the token.
        valid_after: items still possible after it.
            These three are None in data without a catalogue (see `Objective.needs_catalogue`).
    """

    counts: np.ndarray
    train_count: np.ndarray
    branching: np.ndarray | None
    valid_before: np.ndarray | None
    valid_after: np.ndarray | None
    options: ObjectiveOptions


def mean(view: GroupView) -> tuple[Tensor, Tensor | None]:
    """Token mean: q = share of the (weighted) tokens, whatever the losses."""
    q = view.counts.double() / view.counts.sum().clamp_min(1e-300)
    return q, None if view.losses is None else (q * torch.where(view.present, view.losses, 0.0)).sum()


@dataclass(frozen=True)
class Objective:
    name: str
    source: str
    formula: str
    aggregate: Callable[[GroupView], tuple[Tensor, Tensor | None]] = mean
    needs_losses: bool = field(
        default=False
    )  # aggregate looks at losses: exact with estimate=batch, one step late with ema
    first_weights: Callable[[GroupView], Tensor] = GroupView.prior  # q with ema while no loss is known
    remember: Callable[[GroupView], None] | None = None  # after the step: what else the state should learn
    token_term: Callable[[TokenView], Tensor] | None = None
    token_weights: Callable[[TokenTable], np.ndarray] | None = None
    live_weights: Callable[[TokenView], Tensor] | None = None
    top_k: Callable[[ObjectiveOptions], int] | None = None
    masked_softmax: bool = False
    history_free_pass: bool = False
    per_token: Callable[[DroSection], bool] = field(default=lambda section: False)
    needs_catalogue: bool = False  # token_weights reads what only a catalogue gives (TokenTable)
    # What it reads of `dro` and `options`, e.g. "dro.tau", beside what `needs_losses` brings. A run
    # tells which settings were given and are not read. None: the objective does not say; no line then.
    settings: tuple[str, ...] | None = None

    @property
    def requires_catalogue(self) -> bool:
        """Whether it works on data with a catalogue only."""
        return self.needs_catalogue or self.masked_softmax

    def is_late(self, section: DroSection) -> bool:
        """True when weights need the losses of the same global batch (a no-grad first pass under
        accumulation).
        """
        return (
            self.live_weights is not None
            or self.per_token(section)
            or (self.needs_losses and section.estimate == "batch" and section.frozen_weights is None)
        )
