"""Losses of target tokens at every temperature, and log-probabilities of listed answers. All exact.

Rows are padded; hidden states of target positions alone meet the output matrix, in slices of bounded size.

Shapes: N target tokens of a batch, V vocabulary, T temperatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.calibration import STEPS_PER_OCTAVE, TEMPERATURES
from gdrt_ds.batches import build_micro_batch
from gdrt_ds.data.prompts import EncodedPrompt, store_of
from gdrt_ds.inference.prompt_reader import LmHeadRows
from gdrt_ds.inference.row_model import RowModel
from gdrt_ds.models.families import decoder

LOGIT_BYTES = 128 << 20  # float64 logits [rows, V] of one slice of target positions
BATCH_TOKENS = 4096  # padded tokens of one forward


@dataclass(frozen=True)
class Scored:
    """One row behind one prompt.

    Attributes:
        losses: float64[target tokens], -ln p(token).
        curves: float64[target tokens, T], the same at each temperature; None where it was not asked for.
    """

    losses: np.ndarray
    curves: np.ndarray | None


class RowScorer:
    """Scores encoded rows under a model.

    Args:
        model: what `open_row_run` returns.
    """

    def __init__(self, model: RowModel):
        self.backbone = decoder(model.loaded.model)
        self.head = LmHeadRows.of(model.loaded.model)
        self.device = self.backbone.get_input_embeddings().weight.device
        self.pad_id = model.loaded.tokenizer.pad_token_id

    @torch.inference_mode()
    def score(self, encoded: Sequence[EncodedPrompt], with_curves: bool) -> list[Scored]:
        """Scores rows, in their order."""
        found: list[Scored | None] = [None] * len(encoded)
        for members in batches([len(one.input_ids) for one in encoded]):
            store = store_of([encoded[index] for index in members])
            micro = build_micro_batch(store, np.arange(len(members)), "none", 0, self.pad_id, self.device)
            states = self.backbone(**micro.inputs, use_cache=False).last_hidden_state
            states = states.reshape(-1, states.shape[-1]).index_select(0, micro.supervised)
            losses, curves = self._losses(states, micro.labels, with_curves)
            bounds = store.target_offsets
            for place, index in enumerate(members):
                own = slice(bounds[place], bounds[place + 1])
                found[index] = Scored(losses[own], None if curves is None else curves[own])
        return [one for one in found if one is not None]

    def _losses(
        self, states: Tensor, labels: Tensor, with_curves: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """float64[N] losses, and float64[N, T] at all temperatures."""
        losses, curves = [], []
        step = max(1, LOGIT_BYTES // (8 * self.head.weight.shape[0]))
        for start in range(0, len(labels), step):
            logits = self.head.vocabulary_logits(states[start : start + step]).double()
            own = logits.gather(1, labels[start : start + step, None])
            losses.append((logits.logsumexp(1) - own[:, 0]).cpu().numpy())
            if with_curves:
                temperatures = torch.from_numpy(TEMPERATURES).to(logits.device)
                curves.append((log_sums(logits) - own / temperatures).cpu().numpy())
        return np.concatenate(losses), np.concatenate(curves) if with_curves else None


def log_sums(logits: Tensor) -> Tensor:
    """ln sum_v exp(s_v / T) at each of TEMPERATURES: [N, V] -> [N, T], as `calibration.log_sums` does.

    Halving a temperature squares exp(s / T), so one octave of exponentials gives the others.
    """
    highest = logits.max(dim=1, keepdim=True).values
    temperatures = torch.from_numpy(TEMPERATURES).to(logits.device)
    sums = torch.empty(len(logits), len(TEMPERATURES), dtype=logits.dtype, device=logits.device)
    for place in range(STEPS_PER_OCTAVE):
        # From the highest octave down: 64, 32, 16, ... share their place in the octave.
        column = len(TEMPERATURES) - STEPS_PER_OCTAVE + place
        powers = ((logits - highest) / TEMPERATURES[column]).exp()
        while column >= 0:
            sums[:, column] = powers.sum(1)
            powers = powers * powers
            column -= STEPS_PER_OCTAVE
    return sums.log() + highest / temperatures


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of at most BATCH_TOKENS padded tokens, those of similar length together."""
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if members and lengths[index] * (len(members) + 1) > BATCH_TOKENS:
            yield members
            members = []
        members.append(index)
    if members:
        yield members
