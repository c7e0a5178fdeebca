"""One optimizer step: micro-batches forward, one packed all-reduce, weights, backward, optimizer.

Three orders, chosen by what the weights need (method.md):
  early    weights known before the forward (sft, ema, fixed token weights): forward and backward per micro-batch, then reduce
  late     weights from this batch's losses, one micro-batch: forward, reduce, backward
  two-pass the same under accumulation: a no-grad pass with the same dropout masks, reduce, then forward and backward.
           Several micro-batch graphs are never held at once: under ZeRO-3 that overwrites gradients silently.
DeepSpeed averages gradients over ranks; `F` is a sum over the global batch, so the local scalar is multiplied by the world
size here, in this one place, and the engine is told not to divide by the accumulation steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gdrt_ds import dro
from gdrt_ds.batches import BatchPlan, MicroBatch, build_micro_batch
from gdrt_ds.config import RunConfig
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError
from gdrt_ds.loss import AllowedTokens
from gdrt_ds.objectives import GroupView, Objective, TokenView
from gdrt_ds.runtime import Runtime


class NonFiniteLoss(UserError):
    """NaN or inf on some rank; raised on every rank in the same step, before the optimizer."""


@dataclass
class TrainTokens:
    """The train split as the step needs it. Arrays over its target tokens unless said otherwise.

    groups int16; weights float64 (all 1 where the objective has none); reference float32 or None (loss of the reference
    model with history, for dro.excess); trie_node int32 or None with trie_offsets, trie_tokens (masked softmax);
    history_free: the same samples without history, or None.
    """

    store: TokenStore
    groups: np.ndarray
    num_groups: int
    weights: np.ndarray | None = None
    reference: np.ndarray | None = None
    trie_node: np.ndarray | None = None
    trie_offsets: Tensor | None = None
    trie_tokens: Tensor | None = None
    history_free: TokenStore | None = None


@dataclass
class StepResult:
    """Device tensors and counts of one step. `group_loss` is NaN for absent groups; `skipped` = non-finite and skipped."""

    loss: Tensor
    objective: Tensor
    group_loss: Tensor
    group_weight: Tensor
    group_count: Tensor
    tokens: int
    stop: bool
    skipped: bool


def group_sums(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """[N] -> float64[G], deterministic (a matrix product, no atomics)."""
    onehot = torch.nn.functional.one_hot(groups, num_groups).to(torch.float64)
    return values.to(torch.float64) @ onehot


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
        head_length: int,
        pad_id: int,
        frozen_q: Tensor | None = None,
    ):
        self.engine, self.plan, self.tokens, self.objective, self.config, self.state = (
            engine,
            plan,
            tokens,
            objective,
            config,
            state,
        )
        self.runtime, self.packing, self.head_length, self.pad_id = runtime, packing, head_length, pad_id
        self.frozen_q = frozen_q
        self.per_token = objective.per_token(config.dro)
        self.late = objective.is_late(config.dro)
        temperature = config.options.msl_temperature if objective.masked_softmax else 1.0
        self.temperature = temperature

    # -- data of one step ------------------------------------------------------------------------------------------------
    def _micro(self, samples: np.ndarray) -> tuple[MicroBatch, MicroBatch | None]:
        build = lambda store: build_micro_batch(
            store, samples, self.packing, self.head_length, self.pad_id, self.runtime.device
        )
        return build(self.tokens.store), build(
            self.tokens.history_free
        ) if self.tokens.history_free is not None else None

    def _step_facts(self, layout: list[list[np.ndarray]]) -> tuple[Tensor, Tensor | None, np.ndarray]:
        """Group counts and reference sums of the whole global batch, and its target tokens in the order of the layout.

        Every rank computes them from the plan, without talking. A sample that comes twice in a step (the turn of an epoch)
        is there twice.
        """
        offsets = self.tokens.store.target_offsets
        index = np.concatenate(
            [np.arange(offsets[s], offsets[s + 1]) for slots in layout for samples in slots for s in samples]
        )
        groups, size = self.tokens.groups[index], self.tokens.num_groups
        weights = None if self.tokens.weights is None else self.tokens.weights[index]
        counts = torch.from_numpy(np.bincount(groups, weights, size).astype(np.float64)).to(
            self.runtime.device
        )
        reference = None
        if self.tokens.reference is not None:
            reference = torch.from_numpy(np.bincount(groups, self.tokens.reference[index], size)).to(
                self.runtime.device
            )
        return counts, reference, index

    def _token_slots(self, layout: list[list[np.ndarray]]) -> list[Tensor]:
        """Per micro-batch of this rank: Long[N], the places of its target tokens among those of the global batch."""
        lengths = np.array(
            [[int(self.tokens.store.num_target[samples].sum()) for samples in slots] for slots in layout]
        )
        stops = lengths.cumsum().reshape(lengths.shape)
        rank = self.runtime.rank
        return [
            torch.arange(stops[a, rank] - lengths[a, rank], stops[a, rank], device=self.runtime.device)
            for a in range(len(layout))
        ]

    # -- forward ---------------------------------------------------------------------------------------------------------
    def _seed(self, step: int, micro: int) -> None:
        """Dropout is a function of (seed, step, micro-batch, rank): both passes and a resumed run draw the same masks."""
        mixed = np.random.SeedSequence(
            [self.config.train.seed, step, micro, self.runtime.rank]
        ).generate_state(2)
        torch.manual_seed(int(mixed[0]) << 31 ^ int(mixed[1]))

    def _forward(
        self, samples: np.ndarray, step: int, index: int
    ) -> tuple[Tensor, Tensor, Tensor, MicroBatch]:
        """(S[G] differentiable, v[N] differentiable, groups[N], micro-batch)."""
        self._seed(step, index)
        micro, history_free = self._micro(samples)
        groups = torch.from_numpy(self.tokens.groups[micro.token_index].astype(np.int64)).to(
            self.runtime.device
        )
        allowed = None
        if self.tokens.trie_node is not None:
            node = torch.from_numpy(self.tokens.trie_node[micro.token_index].astype(np.int64))
            allowed = AllowedTokens(node, self.tokens.trie_offsets, self.tokens.trie_tokens)
        sums, losses, counterfactual = self.engine(
            micro, groups, self.tokens.num_groups, self.temperature, allowed, history_free
        )
        weights = self.tokens.weights
        if self.objective.token_term is None and weights is None:
            return sums, losses, groups, micro
        values = losses
        if self.objective.token_term is not None:
            store = self.tokens.store
            owner = (
                np.repeat(micro.samples, store.num_target[micro.samples])
                if len(micro.samples)
                else np.zeros(0, dtype=np.int64)
            )
            place = torch.from_numpy((micro.token_index - store.target_offsets[owner]).astype(np.int64)).to(
                self.runtime.device
            )
            length = torch.from_numpy(store.num_target[owner].astype(np.int64)).to(self.runtime.device)
            values = self.objective.token_term(
                TokenView(losses, place, length, self.config.options, counterfactual)
            )
        if weights is not None:
            values = values * torch.from_numpy(weights[micro.token_index]).to(values)
        return (
            group_sums(values, groups, self.tokens.num_groups) + 0.0 * sums.to(torch.float64),
            values,
            groups,
            micro,
        )

    # -- weights ---------------------------------------------------------------------------------------------------------
    def _view(self, losses: Tensor | None, counts: Tensor) -> GroupView:
        return GroupView(losses, counts, self.state, self.config.dro, self.frozen_q)

    def _early_weights(self, counts: Tensor) -> Tensor:
        """q before the forward: from the state (moving averages after step t-1), or from counts alone."""
        if not self.objective.needs_losses or self.frozen_q is not None:
            return self.objective.aggregate(self._view(None, counts))[0]
        if self.state.steps == 0 and self.objective.remember is None:  # group_dro starts from its own q
            return dro.prior(counts, self.config.dro.prior)
        losses, seen = self.state.ema_losses()
        neutral = (losses * counts * seen).sum() / (counts * seen).sum().clamp_min(
            1e-300
        )  # unseen groups: the average of the seen ones
        return self.objective.aggregate(self._view(torch.where(seen, losses, neutral), counts))[0]

    def _backward(
        self, sums: Tensor, values: Tensor, coefficients: Tensor, token_coefficients: Tensor | None
    ) -> None:
        if token_coefficients is not None:
            scalar = (token_coefficients * values.to(torch.float64)).sum() + 0.0 * sums.to(
                torch.float64
            ).sum()
        else:
            scalar = (coefficients * sums.to(torch.float64)).sum()
        self.engine.backward((scalar * self.runtime.world).to(torch.float32), scale_wrt_gas=False)

    # -- the step --------------------------------------------------------------------------------------------------------
    def run(self, step: int, lr: float) -> StepResult:
        """Raises NonFiniteLoss on every rank when any rank saw NaN or inf and train.on_nonfinite = stop."""
        layout = self.plan.step(step)
        micro_steps = [slots[self.runtime.rank] for slots in layout]
        counts, reference, token_index = self._step_facts(layout)
        slots_of = self._token_slots(layout) if self.per_token else None
        self._slot_groups = self.tokens.groups[token_index]
        buffer = dro.StepBuffer(
            self.tokens.num_groups, self.runtime.device, len(token_index) if self.per_token else 0
        )
        if self.runtime.stop_signal is not None:
            buffer.request_stop()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        safe_counts = counts.clamp_min(1e-300)
        q = self._early_weights(counts) if not self.late else None
        tokens, held, discard = 0, None, False
        two_pass = self.late and len(micro_steps) > 1
        for index, samples in enumerate(micro_steps):
            last = index == len(micro_steps) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            with torch.set_grad_enabled(not two_pass):
                sums, values, groups, micro = self._forward(samples, step, index)
            tokens += micro.num_tokens
            buffer.add(sums, group_sums(self._weights_of(micro), groups, self.tokens.num_groups))
            if self.per_token:
                buffer.add_tokens(slots_of[index], values)
            held = (sums, values, groups)
            if not self.late:
                self._backward(sums, values, q / safe_counts, None)
                held = None
        buffer.reduce().wait()
        nonfinite, stop = buffer.flags()
        if nonfinite and self.config.train.on_nonfinite == "stop":
            raise NonFiniteLoss(*self._nonfinite_message(step))
        losses = buffer.losses - (reference / safe_counts if reference is not None else 0.0)
        objective = None
        if self.late and not nonfinite:
            q, objective, token_q = self._late_weights(losses, buffer)
            if two_pass:
                self._second_pass(micro_steps, step, q / safe_counts, token_q, slots_of)
            else:
                sums, values, groups = held
                self._backward(
                    sums, values, q / safe_counts, token_q[slots_of[0]] if token_q is not None else None
                )
        if nonfinite:
            q = counts * float("nan")
            if not self.late:
                discard_gradients(self.engine)
            discard = True
        else:
            if self.config.train.debug_sync:
                dro.assert_equal_on_all_ranks(q, f"the DRO weights of step {step}")
            self.engine.set_gradient_accumulation_boundary(True)
            skipped_before = self.engine.skipped_steps
            self.engine.step()
            discard = (
                self.engine.skipped_steps > skipped_before
            )  # finite losses, but DeepSpeed found gradients that are not, on all ranks
            if (
                discard and self.config.train.on_nonfinite == "stop" and not self.engine.fp16_enabled()
            ):  # float16: the loss scale adapts that way
                raise NonFiniteLoss(*self._nonfinite_message(step, "gradients"))
            if not discard:
                self._remember(losses, counts)
        if objective is None:
            objective = (q * torch.where(counts > 0, losses, 0.0)).sum()
        absent = torch.where(counts > 0, 0.0, float("nan"))
        unknown = float("nan") if nonfinite else 0.0  # the buffer holds the finite part of the sums only
        return StepResult(
            buffer.loss_sums.sum() / buffer.counts.sum().clamp_min(1e-300) + unknown,
            objective,
            buffer.losses + absent + unknown,
            q + absent,
            counts,
            tokens,
            stop,
            discard,
        )

    def _weights_of(self, micro: MicroBatch) -> Tensor:
        if self.tokens.weights is None:
            return torch.ones(len(micro.token_index), dtype=torch.float64, device=self.runtime.device)
        return torch.from_numpy(self.tokens.weights[micro.token_index]).to(self.runtime.device)

    def _late_weights(self, losses: Tensor, buffer: dro.StepBuffer) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q[G], objective, per-token coefficients or None)."""
        if not self.per_token:
            q, objective = self.objective.aggregate(self._view(losses, buffer.counts))
            return q, objective, None
        single = torch.full_like(buffer.token_losses, 1.0)
        token_q, objective = self.objective.aggregate(self._view(buffer.token_losses, single))
        groups = torch.from_numpy(self._slot_groups.astype(np.int64)).to(self.runtime.device)
        return group_sums(token_q, groups, self.tokens.num_groups), objective, token_q

    def _second_pass(
        self,
        micro_steps,
        step: int,
        coefficients: Tensor,
        token_q: Tensor | None,
        slots_of: list[Tensor] | None,
    ) -> None:
        for index, samples in enumerate(micro_steps):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_steps) - 1)
            sums, values, _, _ = self._forward(samples, step, index)
            self._backward(
                sums, values, coefficients, token_q[slots_of[index]] if token_q is not None else None
            )

    def _remember(self, losses: Tensor, counts: Tensor) -> None:
        present = counts > 0
        self.state.update_ema(losses, present, self.config.dro.ema_rate)
        if self.objective.remember is not None:
            self.objective.remember(self._view(losses, counts))
        self.state.steps += 1

    def _nonfinite_message(self, step: int, where: str = "loss") -> tuple[str, str]:
        return (
            f"step {step + 1}: NaN or inf in the {where} of some rank; no rank has taken this step",
            "lower train.lr, check model.dtype (float16 overflows), or set train.on_nonfinite=skip; resume=auto goes on from the last checkpoint",
        )


def discard_gradients(engine) -> None:
    """Throws this step's accumulated gradients away on every ZeRO stage."""
    optimizer = engine.optimizer
    for name in ("averaged_gradients", "all_grad_tensors"):
        if isinstance(getattr(optimizer, name, None), dict):
            getattr(optimizer, name).clear()
    optimizer.zero_grad()
    engine.zero_grad()
