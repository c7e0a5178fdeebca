"""Deterministic global batches, balanced over ranks by length.

The sample stream is the concatenation of seeded permutations of the training set; optimizer step k takes
positions k*B .. (k+1)*B - 1. The content of a step depends on (seed, step) alone, never on ranks,
accumulation or packing. So the position in the data *is* the step number, and resuming needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gdrt_ds.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Says who computes what: `step(k)` gives the samples of every micro-batch of every rank."""

    lengths: np.ndarray  # int64[n] tokens per sample
    global_batch: int
    micro_batch: int
    world: int
    seed: int
    packed: bool = True

    def __post_init__(self):
        if self.global_batch < self.world:
            raise UserError(
                f"train.global_batch = {self.global_batch} is smaller than the {self.world} ranks",
                f"use at most {self.global_batch} ranks or set train.global_batch to at least {self.world}",
            )
        if len(self.lengths) == 0:
            raise UserError("the train split is empty", "check data.path and data.split_ratio")

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return -(-self.global_batch // (self.world * self.micro_batch))

    def samples(self, step: int) -> np.ndarray:
        """Returns int64[B], the sample indices of optimizer step `step`, sorted."""
        count = len(self.lengths)
        position = step * self.global_batch
        stop = position + self.global_batch
        parts = []
        while position < stop:
            epoch, offset = divmod(position, count)
            order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(count)
            take = min(stop - position, count - offset)
            parts.append(order[offset : offset + take])
            position += take
        return np.sort(np.concatenate(parts))

    def step(self, step: int) -> list[list[np.ndarray]]:
        """Returns [accumulation][world] arrays of sample indices; ranks of a micro-step carry equal work."""
        return self.split(self.samples(step))

    def split(self, samples: np.ndarray) -> list[list[np.ndarray]]:
        """Splits any set of samples over accumulation x world slots; a slot may be empty."""
        accumulation = max(1, -(-len(samples) // (self.world * self.micro_batch)))
        slots = accumulation * self.world
        order = samples[np.argsort(-self.lengths[samples], kind="stable")]
        members: list[list[int]] = [[] for _ in range(slots)]
        if self.packed:
            # Longest first, into the lightest slot that has room: a packed row costs its tokens.
            room = -(-len(samples) // slots)
            loads = np.zeros(slots)
            for sample in order:
                slot = int(np.argmin(np.where([len(m) < room for m in members], loads, np.inf)))
                members[slot].append(int(sample))
                loads[slot] += self.lengths[sample]
        else:
            # Neighbours in length share a row: the cost of a padded row is that of its longest sample.
            for slot, part in enumerate(np.array_split(order, slots)):
                members[slot] = [int(sample) for sample in part]
        ranked = sorted(members, key=self._cost, reverse=True)
        return [
            [np.array(sorted(ranked[a * self.world + r]), dtype=np.int64) for r in range(self.world)]
            for a in range(accumulation)
        ]

    def _cost(self, members: list[int]) -> int:
        """Tokens that a slot computes."""
        lengths = self.lengths[members]
        if self.packed:
            return int(sum(lengths))
        return int(len(members) * max(lengths, default=0))

    def describe(self) -> str:
        """Says the arithmetic of the batches in one line."""
        return (
            f"global batch {self.global_batch} = {self.world} ranks x {self.accumulation} accumulation x "
            f"micro-batch {-(-self.global_batch // (self.world * self.accumulation))}"
        )
