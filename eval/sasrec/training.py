"""One setting of SASRec: epochs, validation after each, and the weights of the best epoch.

Best is the lowest mean NLL of the valid targets. NDCG@10 is recorded beside it. On small valid splits NDCG@10
jumps from epoch to epoch by more than settings differ: by up to .010 with the 943 users of MovieLens-100k.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from eval.sasrec.model import SASRec
from eval.sasrec.sequences import Histories, Sequences
from eval.scoring.ranking import TIE

TARGETS_PER_STEP = 1280
"""At most: a step takes so many segments that their targets are this many if all are full."""

CPU = torch.device("cpu")

BETAS = (0.9, 0.98)
"""Of Adam, as in the paper."""

MAX_EPOCHS = 40
PATIENCE = 4
"""Epochs without a lower validation NLL after which a setting ends."""

SCORED_AT_ONCE = 256
"""Histories whose scores over the catalogue are held together."""

TIMED_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """One cell of the grid.

    Attributes:
        hidden: size of embeddings and layers.
        dropout: of embeddings, attention and layers.
        learning_rate: of Adam.
    """

    hidden: int
    dropout: float
    learning_rate: float

    def words(self) -> str:
        return f"hidden {self.hidden}, dropout {self.dropout:g}, learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean train loss, and NDCG@10 and mean NLL of the valid targets."""

    loss: float
    ndcg: float
    nll: float


@dataclass
class Training:
    """A setting in training. It may pause after any epoch and go on: every epoch has its own random numbers.

    Attributes:
        epochs: those that are finished.
        best: place in `epochs` of the lowest validation NLL; the first of equal ones.
        best_weights: of the model after that epoch.
    """

    sequences: Sequences
    setting: Setting
    seed: int = 0
    device: torch.device = CPU
    epochs: list[Epoch] = field(default_factory=list)
    best: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        with self._random_numbers(0):
            self.model = new_model(self.sequences, self.setting).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.setting.learning_rate, betas=BETAS)

    @property
    def ended(self) -> bool:
        """Whether early stopping or the limit of epochs has come."""
        return len(self.epochs) >= MAX_EPOCHS or len(self.epochs) - 1 - self.best >= PATIENCE

    @property
    def best_nll(self) -> float:
        return self.epochs[self.best].nll

    def run_epoch(self) -> Epoch:
        """Trains one epoch and validates."""
        number = len(self.epochs) + 1
        ids, targets = self.sequences.segments([self.seed, number])
        with self._random_numbers(number):
            losses = [self._step(rows, wanted) for rows, wanted in self._batches(ids, targets)]
        ndcg, nll = validate(self.model, self.sequences)
        self.epochs.append(Epoch(float(np.mean(losses)), ndcg, nll))
        if self.best < 0 or nll < self.best_nll:
            self.best = len(self.epochs) - 1
            self.best_weights = {
                name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()
            }
        return self.epochs[-1]

    def seconds_per_epoch(self) -> float:
        """An estimate from a few steps. They change the weights: a training that is timed is thrown away."""
        ids, targets = self.sequences.segments([self.seed, 0])
        batches = list(self._batches(ids, targets))
        timed = batches[:TIMED_STEPS]
        with self._random_numbers(0):
            self._step(*batches[0])  # the first step allocates
            started = time.perf_counter()
            for batch in timed:
                self._step(*batch)
        step_s = (time.perf_counter() - started) / len(timed)
        started = time.perf_counter()
        histories = self.sequences.valid
        some = Histories(histories.ids[:SCORED_AT_ONCE], histories.last[:SCORED_AT_ONCE])
        log_probs(self.model, some)
        score_s = (time.perf_counter() - started) / len(some.last)
        return step_s * len(batches) + score_s * len(histories.last)

    def _batches(self, ids: np.ndarray, targets: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, TARGETS_PER_STEP // self.sequences.max_history)
        for start in range(0, len(ids), size):
            chosen = slice(start, start + size)
            yield torch.from_numpy(ids[chosen]), torch.from_numpy(targets[chosen])

    def _step(self, ids: Tensor, targets: Tensor) -> float:
        self.model.train()
        loss = self.model.loss(ids.to(self.device), targets.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @contextlib.contextmanager
    def _random_numbers(self, epoch: int) -> Iterator[None]:
        """Random numbers of one epoch; those of the process are as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
            yield


def new_model(sequences: Sequences, setting: Setting) -> SASRec:
    """A model before its first step. It scores like popularity among the train targets."""
    model = SASRec(sequences.num_items, sequences.max_history, setting.hidden, setting.dropout)
    counts = np.bincount(sequences.targets(), minlength=sequences.num_items) + 1.0
    with torch.no_grad():
        model.bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    return model


@torch.no_grad()
def log_probs(model: SASRec, histories: Histories) -> np.ndarray:
    """ln p(entry) for the item behind each history, float64 [n, I]; a row sums to one after exp."""
    model.eval()
    device = model.bias.device
    found = []
    for start in range(0, len(histories.last), SCORED_AT_ONCE):
        chosen = slice(start, start + SCORED_AT_ONCE)
        last = torch.from_numpy(histories.last[chosen]).to(device)
        # Slots behind the longest history of these rows are padding for all of them.
        ids = torch.from_numpy(histories.ids[chosen, : int(last.max()) + 1]).to(device)
        states = model.states(ids)[torch.arange(len(last), device=device), last]
        found.append(model.logits(states).double().log_softmax(-1).cpu().numpy())
    return np.concatenate(found)


def accuracy(scores: np.ndarray, targets: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """NDCG@k and HR@k of every row, float64 [n]. Entries that tie share their places, as everywhere in eval.

    Args:
        scores: float64 [n, I]. targets: int64[n], entries.
    """
    own = scores[np.arange(len(targets)), targets][:, None]
    better = (scores > own + TIE).sum(axis=1)
    tied = (np.abs(scores - own) <= TIE).sum(axis=1)
    gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # of the first places
    first = np.minimum(better, k)
    last = np.minimum(better + tied, k)
    return (gain[last] - gain[first]) / tied, (last - first) / tied


def validate(model: SASRec, sequences: Sequences) -> tuple[float, float]:
    """Mean NDCG@10 and mean NLL of the valid targets."""
    ndcg = nll = 0.0
    num = len(sequences.valid_targets)
    for start in range(0, num, SCORED_AT_ONCE):
        chosen = slice(start, start + SCORED_AT_ONCE)
        targets = sequences.valid_targets[chosen]
        scores = log_probs(model, Histories(sequences.valid.ids[chosen], sequences.valid.last[chosen]))
        ndcg += float(accuracy(scores, targets)[0].sum())
        nll -= float(scores[np.arange(len(targets)), targets].sum())
    return ndcg / num, nll / num
