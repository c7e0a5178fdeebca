"""One optimizer step: micro-batches forward, one packed all-reduce, weights, backward, optimizer.

What the weights need decides the order (method.md). Each order is one method of `StepRunner`:
  _early_order     Weights are known before the forward (sft, moving averages, fixed token weights).
                   Every micro-batch runs forward and backward; the all-reduce comes last.
  _late_order      Weights need this batch's losses (or their sum does), and the rank has one micro-batch:
                   forward, all-reduce, backward.
  _two_pass_order  The same under gradient accumulation: a pass without gradients, all-reduce, then forward
                   and backward with the same dropout masks. Several micro-batch graphs are never held at
                   once, because ZeRO-3 then overwrites gradients silently.

DeepSpeed averages gradients over ranks, while F is a sum over the global batch. So the local scalar is
multiplied by the world size here, in `_backward` alone, and the engine is told not to divide by the
accumulation steps.

Shapes: N target tokens of a micro-batch, M target tokens of the global batch, G groups.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gdrt_ds import dro
from gdrt_ds.batches import BatchPlan, MicroBatch, build_micro_batch
from gdrt_ds.batches.token_keys import step_entropy
from gdrt_ds.config import RunConfig
from gdrt_ds.loss import AllowedTokens, group_sums
from gdrt_ds.objectives import GroupView, Objective
from gdrt_ds.runtime import Runtime, to_device
from gdrt_ds.training.broken_numbers import LOWER_RATE, NonFiniteLoss
from gdrt_ds.training.step_inputs import TrainTokens, allowed_tokens

SMALLEST_COUNT = 1e-300  # stands in for a count of 0 under a division whose numerator is 0 too


@dataclass(frozen=True)
class StepResult:
    """What a step measured; device tensors, so that reading them later costs no synchronisation.

    Attributes:
        loss: float64[] token mean of the values that were trained on, over the global batch.
        objective: float64[] F.
        group_loss, group_weight: float64[G], NaN for groups absent from this global batch.
        group_count: float64[G] target tokens (or their weights) of this global batch.
        tokens: tokens that this rank computed, padding not counted.
        all_tokens: float64[] the same of all ranks.
        stop: some rank was asked to stop.
        skipped: the step was not taken, because a loss or gradient was not finite.
    """

    loss: Tensor
    objective: Tensor
    group_loss: Tensor
    group_weight: Tensor
    group_count: Tensor
    tokens: int
    all_tokens: Tensor
    stop: bool
    skipped: bool


@dataclass(frozen=True)
class StepFacts:
    """What is known of a step before any forward. Every rank computes it from the plan, without talking.

    Attributes:
        micro_steps: sample indices of this rank's micro-batches.
        counts: float64[G] target tokens (or their fixed weights) of the global batch.
        reference: float64[G] sums of the reference losses (dro.excess), or None.
        groups: int16[M] groups of the target tokens of the global batch, in the order of the plan.
        slots: per micro-batch Long[N], the places of its target tokens among those M; only for weights per
        token.
    """

    micro_steps: list[np.ndarray]
    counts: Tensor
    reference: Tensor | None
    groups: np.ndarray
    slots: list[Tensor] | None


@dataclass(frozen=True)
class Forward:
    """One micro-batch after its forward: sums float[G] and values float[N] are differentiable.

    Groups Long[N]; weights float64[N], which sums and values already contain, None where all are 1.
    """

    sums: Tensor
    values: Tensor
    groups: Tensor
    weights: Tensor | None
    micro: MicroBatch


@dataclass(frozen=True)
class Weighed:
    """What an order of events leaves: gradients in the engine unless `nonfinite`, and what went into them.

    Attributes:
        losses: float64[G] group losses over all ranks, minus the reference's with dro.excess.
        q: float64[G] weights, NaN if `nonfinite`.
        objective: float64[] F.
        tokens: tokens that this rank computed.
    """

    losses: Tensor
    q: Tensor
    objective: Tensor
    tokens: int
    nonfinite: bool
    stop: bool


class StepRunner:
    """Runs optimizer steps of one objective on one DeepSpeed engine."""

    def __init__(
        self,
        engine,
        plan: BatchPlan,
        tokens: TrainTokens,
        objective: Objective,
        config: RunConfig,
        state: dro.DroState,
        runtime: Runtime,
        *,
        packing: str,
        prefix_length: int,
        pad_id: int,
        frozen_q: Tensor | None = None,
    ):
        self.engine = engine
        self.plan = plan
        self.tokens = tokens
        self.objective = objective
        self.config = config
        self.state = state
        self.runtime = runtime
        self.packing = packing
        self.prefix_length = prefix_length
        self.pad_id = pad_id
        self.frozen_q = frozen_q
        self.per_token = objective.per_token(config.dro)
        self.late = objective.is_late(config.dro)
        self.temperature = config.options.msl_temperature if objective.masked_softmax else 1.0
        self.top_k = None if objective.top_k is None else objective.top_k(config.options)

    def with_groups(self, groups: np.ndarray) -> StepRunner:
        """The same runner on other groups [train target tokens]; engine and group-DRO state are shared."""
        other = copy.copy(self)
        other.tokens = replace(self.tokens, groups=groups)
        return other

    # -- the step
    def run(self, step: int, lr: float) -> StepResult:
        """Takes optimizer step `step` (0-based) at learning rate `lr`. Every rank calls it.

        Raises:
            NonFiniteLoss: on every rank, when any rank saw NaN or inf and train.on_nonfinite = stop.
        """
        facts = self._facts(step)
        buffer = dro.StepBuffer(
            self.tokens.num_groups, self.runtime.device, len(facts.groups) if self.per_token else 0
        )
        if self.runtime.stop_signal is not None or self.runtime.time_is_up:
            buffer.request_stop()
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = lr
        if not self.late:
            weighed = self._early_order(step, facts, buffer)
        elif len(facts.micro_steps) == 1:
            weighed = self._late_order(step, facts, buffer)
        else:
            weighed = self._two_pass_order(step, facts, buffer)
        if self.objective.live_weights is not None:
            facts = replace(facts, counts=buffer.counts)
        taken = not weighed.nonfinite and self._take_step(step, weighed.q)
        if taken:
            self._remember(weighed.losses, facts.counts)
        return self._result(facts, buffer, weighed, skipped=not taken)

    def _early_order(self, step: int, facts: StepFacts, buffer: dro.StepBuffer) -> Weighed:
        q = self._early_weights(facts.counts)
        coefficients = q / facts.counts.clamp_min(SMALLEST_COUNT)
        tokens = 0
        for index, samples in enumerate(facts.micro_steps):
            self._mark_boundary(index, facts)
            found = self._forward(samples, step, index)
            self._measure(found, buffer)
            self._backward(found.sums, found.values, coefficients, None)
            tokens += found.micro.num_tokens
        losses, nonfinite, stop = self._reduce(step, facts, buffer)
        if nonfinite:
            discard_gradients(self.engine)
            return self._not_finite(losses, tokens, stop)
        objective = (q * torch.where(facts.counts > 0, losses, 0.0)).sum()
        return Weighed(losses, q, objective, tokens, nonfinite, stop)

    def _late_order(self, step: int, facts: StepFacts, buffer: dro.StepBuffer) -> Weighed:
        self._mark_boundary(0, facts)
        found = self._forward(facts.micro_steps[0], step, 0)
        self._measure(found, buffer, facts.slots[0] if self.per_token else None)
        losses, nonfinite, stop = self._reduce(step, facts, buffer)
        if nonfinite:
            return self._not_finite(losses, found.micro.num_tokens, stop)
        q, objective, token_q = self._late_weights(losses, facts, buffer)
        coefficients = q / buffer.counts.clamp_min(SMALLEST_COUNT)
        own_token_q = None if token_q is None else token_q[facts.slots[0]]
        self._backward(found.sums, found.values, coefficients, own_token_q)
        return Weighed(losses, q, objective, found.micro.num_tokens, nonfinite, stop)

    def _two_pass_order(self, step: int, facts: StepFacts, buffer: dro.StepBuffer) -> Weighed:
        tokens = 0
        for index, samples in enumerate(facts.micro_steps):
            self._mark_boundary(index, facts)
            with torch.no_grad():
                found = self._forward(samples, step, index)
            self._measure(found, buffer, facts.slots[index] if self.per_token else None)
            tokens += found.micro.num_tokens
        losses, nonfinite, stop = self._reduce(step, facts, buffer)
        if nonfinite:
            return self._not_finite(losses, tokens, stop)
        q, objective, token_q = self._late_weights(losses, facts, buffer)
        coefficients = q / buffer.counts.clamp_min(SMALLEST_COUNT)
        for index, samples in enumerate(facts.micro_steps):
            self._mark_boundary(index, facts)
            found = self._forward(samples, step, index)  # the seed of `_forward` gives the first pass's masks
            own_token_q = None if token_q is None else token_q[facts.slots[index]]
            self._backward(found.sums, found.values, coefficients, own_token_q)
        return Weighed(losses, q, objective, tokens, nonfinite, stop)

    # -- what is known before the forward
    def _facts(self, step: int) -> StepFacts:
        """A sample that comes twice in a step (at the turn of an epoch) is counted twice."""
        layout = self.plan.step(step)
        offsets = self.tokens.store.target_offsets
        spans = [
            np.arange(offsets[s], offsets[s + 1])
            for slots in layout
            for samples in slots
            for s in self.tokens.store.sample_of(samples)
        ]
        index = np.concatenate(spans)
        groups = self.tokens.groups[index]
        weights = None if self.tokens.weights is None else self.tokens.weights[index]
        reference = None
        if self.tokens.reference is not None:
            reference = self._reference_losses(index)
            reference = self._sums_over_groups(groups, reference if weights is None else reference * weights)
        return StepFacts(
            micro_steps=[slots[self.runtime.rank] for slots in layout],
            counts=self._sums_over_groups(groups, weights),
            reference=reference,
            groups=groups,
            slots=self._token_slots(layout) if self.per_token else None,
        )

    def _reference_losses(self, index: np.ndarray) -> np.ndarray:
        """float64[M]: the reference losses of these target tokens."""
        assert self.tokens.reference is not None
        losses = self.tokens.reference[index]
        if np.isnan(losses).any():
            raise RuntimeError("a sample of this step has no reference loss (dro.excess); please report this")
        return losses

    def _sums_over_groups(self, groups: np.ndarray, values: np.ndarray | None) -> Tensor:
        """float64[G] on the device.

        Sums of `values` [M] by group, or the number of tokens where values is None.
        """
        sums = np.bincount(groups, values, self.tokens.num_groups).astype(np.float64)
        return to_device(sums, self.runtime.device)

    def _token_slots(self, layout: list[list[np.ndarray]]) -> list[Tensor]:
        """Per micro-batch of this rank.

        Long[N], the places of its target tokens among those of the global batch.
        """
        store = self.tokens.store
        num_target = store.num_target
        lengths = np.array(
            [[int(num_target[store.sample_of(samples)].sum()) for samples in slots] for slots in layout]
        )
        stops = lengths.cumsum().reshape(lengths.shape)
        rank, device = self.runtime.rank, self.runtime.device
        return [
            torch.arange(stops[row, rank] - lengths[row, rank], stops[row, rank], device=device)
            for row in range(len(layout))
        ]

    def _mark_boundary(self, index: int, facts: StepFacts) -> None:
        """DeepSpeed reduces gradients in the backward of the last micro-batch, and has to be told which one
        that is.
        """
        self.engine.set_gradient_accumulation_boundary(index == len(facts.micro_steps) - 1)

    # -- forward
    def _forward(self, samples: np.ndarray, step: int, index: int) -> Forward:
        """Runs micro-batch `index` of a step.

        Dropout masks depend on the seed, the step and a token's prefix alone (models/prefix_dropout.py).
        Random numbers, which dropout inside attention draws, depend on the micro-batch and the rank as well.
        """
        self._seed(step, index)
        entropy = step_entropy(self.config.train.seed, step)
        micro = self._micro_batch(self.tokens.store, samples, entropy)
        history_free = None
        if self.tokens.history_free is not None:
            history_free = self._micro_batch(self.tokens.history_free, samples, entropy)
        groups = self._groups_of(micro)
        allowed = self._allowed_tokens(micro)
        sums, losses, *more = self.engine(
            micro, groups, self.tokens.num_groups, self.temperature, allowed, history_free, self.top_k
        )
        values = losses
        weights = None
        if self.tokens.weights is not None:
            weights = to_device(self.tokens.weights[micro.token_index], losses.device)
        if self.objective.token_term is not None or self.objective.live_weights is not None:
            view = self.tokens.view(micro, self.config.options, losses, *more)
            if self.objective.token_term is not None:
                values = self.objective.token_term(view)
            if self.objective.live_weights is not None:
                weights = self.objective.live_weights(view)
        if values is losses and weights is None:
            return Forward(sums, losses, groups, None, micro)
        if weights is not None:
            values = values * weights.to(values.dtype)
        own_sums = group_sums(values, groups, self.tokens.num_groups)
        # The fused sums are not used, but they stay in the graph with factor 0: a rank whose micro-batch has
        # no target token must still run the backward of the fused loss, or it would leave the others alone in
        # a collective.
        return Forward(own_sums + 0.0 * sums.to(torch.float64), values, groups, weights, micro)

    def _seed(self, step: int, index: int) -> None:
        """Both passes of a step, and a resumed run, draw the same random numbers."""
        entropy = [self.config.train.seed, step, index, self.runtime.rank]
        mixed = np.random.SeedSequence(entropy).generate_state(2)
        torch.manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))

    def _micro_batch(self, store, samples: np.ndarray, entropy: int) -> MicroBatch:
        return build_micro_batch(
            store, samples, self.packing, self.prefix_length, self.pad_id, self.runtime.device, entropy
        )

    def _groups_of(self, micro: MicroBatch) -> Tensor:
        """Long[N]: the group of each target token of a micro-batch."""
        return to_device(self.tokens.groups[micro.token_index].astype(np.int64), self.runtime.device)

    def _allowed_tokens(self, micro: MicroBatch) -> AllowedTokens | None:
        """The catalogue's valid next tokens at each target token, for objectives with a masked softmax."""
        tokens = self.tokens
        if tokens.trie_node is None:
            return None
        return allowed_tokens(tokens.trie_node, tokens.trie_offsets, tokens.trie_tokens, micro)

    # -- measuring
    def _measure(self, found: Forward, buffer: dro.StepBuffer, slots: Tensor | None = None) -> None:
        """Adds one micro-batch to the step's buffer; `slots` where single token losses are needed."""
        counts = group_sums(self._weights_of(found), found.groups, self.tokens.num_groups)
        buffer.add(found.sums, counts)
        buffer.count_tokens(found.micro.num_tokens)
        if slots is not None:
            buffer.add_tokens(slots, found.values)

    def _weights_of(self, found: Forward) -> Tensor:
        """float64[N]: weights of the target tokens, 1 where the objective has none."""
        if found.weights is None:
            return torch.ones(len(found.groups), dtype=torch.float64, device=self.runtime.device)
        return found.weights

    def _reduce(self, step: int, facts: StepFacts, buffer: dro.StepBuffer) -> tuple[Tensor, bool, bool]:
        """The one all-reduce: (group losses [G], non-finite on some rank, stop asked on some rank).

        Raises:
            NonFiniteLoss: on every rank, if train.on_nonfinite = stop.
        """
        buffer.reduce().wait()
        nonfinite, stop = buffer.flags()
        if nonfinite and self.config.train.on_nonfinite == "stop":
            raise self._nonfinite_error(step, "loss")
        losses = buffer.losses
        if facts.reference is not None:
            losses = losses - facts.reference / facts.counts.clamp_min(SMALLEST_COUNT)
        return losses, nonfinite, stop

    # -- weights
    def _view(self, losses: Tensor | None, counts: Tensor) -> GroupView:
        return GroupView(losses, counts, self.state, self.config.dro, self.frozen_q)

    def _early_weights(self, counts: Tensor) -> Tensor:
        """q before the forward: from the state (moving averages after step t-1), or from counts alone."""
        if not self.objective.needs_losses or self.frozen_q is not None:
            return self.objective.aggregate(self._view(None, counts))[0]
        if self.state.steps == 0 and self.objective.remember is None:
            # Nothing is known yet. group_dro starts from its own q instead.
            return self.objective.first_weights(self._view(None, counts))
        losses, seen = self.state.ema_losses()
        # A group that was never seen counts as the average of those that were: neither favoured nor left out.
        average = (losses * counts * seen).sum() / (counts * seen).sum().clamp_min(SMALLEST_COUNT)
        return self.objective.aggregate(self._view(torch.where(seen, losses, average), counts))[0]

    def _late_weights(
        self, losses: Tensor, facts: StepFacts, buffer: dro.StepBuffer
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q[G], objective, weights per target token of the global batch [M] or None)."""
        if not self.per_token:
            q, objective = self.objective.aggregate(self._view(losses, buffer.counts))
            return q, objective, None
        # Every token is a group of its own here; q of a real group is the sum over its tokens, for the log.
        ones = torch.full_like(buffer.token_losses, 1.0)
        token_q, objective = self.objective.aggregate(self._view(buffer.token_losses, ones))
        groups = to_device(facts.groups.astype(np.int64), self.runtime.device)
        return group_sums(token_q, groups, self.tokens.num_groups), objective, token_q

    # -- backward and optimizer
    def _backward(
        self, sums: Tensor, values: Tensor, coefficients: Tensor, token_coefficients: Tensor | None
    ) -> None:
        """Gradients of sum_g coefficients[g] * sums[g], or of the same over single tokens."""
        if token_coefficients is not None:
            scalar = (token_coefficients * values.to(torch.float64)).sum()
            # Factor 0 keeps the fused loss in the graph of a rank without target tokens (see `_forward`).
            scalar = scalar + 0.0 * sums.to(torch.float64).sum()
        else:
            scalar = (coefficients * sums.to(torch.float64)).sum()
        self.engine.backward((scalar * self.runtime.world).to(torch.float32), scale_wrt_gas=False)

    def _take_step(self, step: int, q: Tensor) -> bool:
        """Lets the optimizer step; False if DeepSpeed found gradients that are not finite, on all ranks."""
        if self.config.train.debug_sync:
            dro.assert_equal_on_all_ranks(q, f"the DRO weights of step {step}")
        self.engine.set_gradient_accumulation_boundary(True)
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        if self.engine.skipped_steps == skipped_before:
            return True
        # In float16 a skipped step is how the loss scale adapts; elsewhere it means that training has broken.
        if self.config.train.on_nonfinite == "stop" and not self.engine.fp16_enabled():
            raise self._nonfinite_error(step, "gradients")
        return False

    def _remember(self, losses: Tensor, counts: Tensor) -> None:
        self.state.update_ema(losses, counts > 0, self.config.dro.ema_rate)
        if self.objective.remember is not None:
            self.objective.remember(self._view(losses, counts))
        self.state.steps += 1

    # -- results
    def _not_finite(self, losses: Tensor, tokens: int, stop: bool) -> Weighed:
        unknown = torch.full_like(losses, float("nan"))
        return Weighed(losses, unknown, unknown.sum(), tokens, nonfinite=True, stop=stop)

    def _result(
        self, facts: StepFacts, buffer: dro.StepBuffer, weighed: Weighed, skipped: bool
    ) -> StepResult:
        absent = torch.where(facts.counts > 0, 0.0, float("nan"))
        # The buffer holds only the finite part of the sums: where some were not finite, the total is unknown.
        unknown = float("nan") if weighed.nonfinite else 0.0
        mean = buffer.loss_sums.sum() / buffer.counts.sum().clamp_min(SMALLEST_COUNT)
        return StepResult(
            loss=mean + unknown,
            objective=weighed.objective,
            group_loss=buffer.losses + absent + unknown,
            group_weight=weighed.q + absent,
            group_count=facts.counts,
            tokens=weighed.tokens,
            all_tokens=buffer.tokens.clone(),  # a view would hold the whole buffer until the log is written
            stop=weighed.stop,
            skipped=skipped,
        )

    def _nonfinite_error(self, step: int, where: str) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"step {step + 1}: NaN or inf in the {where} of some rank; no rank has taken this step",
            f"{LOWER_RATE}; train.on_nonfinite=skip leaves such steps out",
        )


def discard_gradients(engine) -> None:
    """Throws this step's accumulated gradients away on every ZeRO stage."""
    optimizer = engine.optimizer
    for name in ("averaged_gradients", "all_grad_tensors"):
        held = getattr(optimizer, name, None)
        if isinstance(held, dict):
            held.clear()
    optimizer.zero_grad()
    engine.zero_grad()
