"""Audit contexts whose scorer is a formula with a known bias: they test the measurement, not a model.

The catalogue, prompts, tokenizer and samples are those of a real (tiny) run folder; only `score_batch`,
`loss_batch` and `title_log_probs` are replaced. The honest scorer likes items of the class that the history
is about, in any order and for any provider. A plant adds exactly one bias to it.
"""

from __future__ import annotations

import numpy as np

from eval.audit.context import AuditContext
from eval.audit.score_rows import probabilities

# Every target follows from the history, so that an honest model has something to read in it.
HONEST_DATA = "data.planted={num_items: 24, num_train: 200, num_valid: 20, num_test: 60, shortcut_share: 0}"


class PlantedContext(AuditContext):
    """A context with a formula for a model.

    Args:
        plant: None, "position", "popularity", "provider" or "shortcut".
        strength: of the plant, in nats (or weight per slot).
    """

    def __init__(
        self, subject, runtime, options, plant: str | None = None, strength: float = 3.0, seed: int = 0
    ):
        super().__init__(subject, runtime, options)
        self.plant, self.strength = plant, strength
        rng = np.random.default_rng(seed)
        entries = self.catalogue.entries
        classes = sorted({e.groups["genres"][0] for e in entries})
        self.class_of = np.array([classes.index(e.groups["genres"][0]) for e in entries])
        self.taste = rng.normal(size=(len(classes), len(entries))) * 0.7 + 2.0 * (
            self.class_of[None] == np.arange(len(classes))[:, None]
        )
        self.prior = (
            rng.normal(size=len(entries)) * 2 - 10
        )  # what a pretrained model would think of each title
        self.noise = rng.normal(size=(len(entries), len(entries))) * 0.5
        self.favoured = sorted({e.provider for e in entries})[0]
        encoder = self.recommender.encoder
        self.instruction = encoder._instruction
        self.place = len(encoder._bos + encoder._before_instruction)

    @property
    def has_adapter(self) -> bool:
        return True

    def base(self) -> PlantedContext:
        return PlantedContext(self.subject, self.runtime, self.options)

    def score_batch(self, histories):
        index_of, rows = self.catalogue.index_of, []
        for history in histories:
            items = [index_of[i] for i in history]
            weights = np.ones(len(items))
            if self.plant == "position":
                weights = np.exp(self.strength * np.arange(len(items)))
            weights = weights / max(weights.sum(), 1e-9)
            row = sum(
                (w * (self.taste[self.class_of[i]] + self.noise[i]) for w, i in zip(weights, items)),
                np.zeros(len(index_of)),
            )
            if self.plant == "popularity":
                row = row + self.strength * self.prior / self.prior.std()
            if self.plant == "provider":
                row = row + self.strength * np.array(
                    [e.provider == self.favoured for e in self.catalogue.entries]
                )
            rows.append(np.log(probabilities(row)))
        return np.array(rows)

    def loss_batch(self, rows, labels, full_only=False):
        """Each target token costs 6 nats, less what instruction (shortcut) or history (honest) gives."""
        found = []
        for (prompt, _), label in zip(rows, labels):
            intact = np.mean(
                [
                    a == b
                    for a, b in zip(prompt[self.place : self.place + len(self.instruction)], self.instruction)
                ]
            )
            shared = np.mean([token in prompt for token in label[:-1]])
            gain = 2.0 * intact if self.plant == "shortcut" else 2.0 * shared
            found.append(
                {"full": np.full(len(label), 6.0 - gain), "renormalised": np.full(len(label), 3.0 - gain)}
            )
        return found

    def title_log_probs(self, which: str) -> np.ndarray:
        return self.prior if which == "base" else np.random.default_rng(5).normal(size=len(self.prior))
