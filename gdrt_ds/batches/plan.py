"""Deterministic global batches, balanced over ranks by length.

The sample stream is the concatenation of seeded permutations of the training set; optimizer step k takes
positions k*B .. (k+1)*B - 1. The content of a step depends on (seed, step) alone, never on ranks,
accumulation or packing. So the position in the data *is* the step number, and resuming needs nothing else.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass

import numpy as np

from gdrt_ds.batches.prefix_tree import in_order, shared_lengths
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.errors import UserError


@functools.lru_cache(maxsize=2)  # a step at the turn of an epoch needs two
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns int32 or int64[count], the order of an epoch. It is kept: the steps of an epoch share it.

    `Generator.permutation(count)` shuffles int64 in the same way and takes twice the memory.
    """
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.Generator(np.random.PCG64([seed, epoch])).shuffle(order)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchPlan:
    """Says who computes what: `step(k)` gives the samples of every micro-batch of every rank."""

    lengths: np.ndarray | None
    """int64[n], tokens per sample; None with a store, whose rows are counted when they are dealt."""
    global_batch: int
    micro_batch: int
    world: int
    seed: int
    packed: bool = True
    store: TokenStore | None = None
    """The samples, where the plan needs their tokens: for `trees`, and where windows grow."""
    trees: bool = False
    """Common prefixes are merged, so samples that begin alike share a slot."""

    def __post_init__(self):
        if self.global_batch < self.world:
            raise UserError(
                f"train.global_batch = {self.global_batch} is smaller than the {self.world} ranks",
                f"use at most {self.global_batch} ranks or set train.global_batch to at least {self.world}",
            )
        if self.count == 0:
            raise UserError("the train split is empty", "check data.path and data.split_ratio")

    @property
    def count(self) -> int:
        """Samples of an epoch."""
        return len(self.lengths if self.store is None else self.store)

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one step."""
        return -(-self.global_batch // (self.world * self.micro_batch))

    def samples(self, step: int) -> np.ndarray:
        """Returns int64[B], the sample indices of optimizer step `step`, sorted."""
        count = self.count
        position = step * self.global_batch
        stop = position + self.global_batch
        parts = []
        while position < stop:
            epoch, offset = divmod(position, count)
            order = self.order(epoch)
            take = min(stop - position, count - offset)
            parts.append(order[offset : offset + take])
            position += take
        return np.sort(np.concatenate(parts).astype(np.int64))

    def order(self, epoch: int) -> np.ndarray:
        """All samples of an epoch: in the order of the data where windows grow, else a seeded permutation."""
        order = None if self.store is None else self.store.order(epoch)
        if order is not None:
            return order
        return permutation(self.seed, epoch, self.count)

    def _lengths_of(self, samples: np.ndarray | list[int]) -> np.ndarray:
        """int64[...]: tokens of each sample."""
        if self.store is None:
            return self.lengths[np.asarray(samples, dtype=np.int64)]
        return np.array([len(row) for row in self.store.rows(samples)], dtype=np.int64)

    def step(self, step: int) -> list[list[np.ndarray]]:
        """Returns [accumulation][world] arrays of sample indices; ranks of a micro-step carry equal work."""
        return self.split(self.samples(step))

    def split(self, samples: np.ndarray) -> list[list[np.ndarray]]:
        """Splits any set of samples over accumulation x world slots; a slot may be empty."""
        accumulation = max(1, -(-len(samples) // (self.world * self.micro_batch)))
        slots = accumulation * self.world
        if self.trees:
            members, cost = self._split_trees(samples, slots)
        elif self.packed:
            members, cost = self._split_packed(samples, slots)
        else:
            members, cost = self._split_padded(samples, slots)
        # The slots of one micro-step are neighbours in cost, so that no rank waits long for another.
        ranked = [members[i] for i in sorted(range(slots), key=lambda i: (-cost[i], i))]
        return [
            [np.array(sorted(ranked[a * self.world + r]), dtype=np.int64) for r in range(self.world)]
            for a in range(accumulation)
        ]

    def _longest_first(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(samples, their tokens). They are counted once: where windows grow, counting makes the rows."""
        lengths = self._lengths_of(samples)
        order = np.argsort(-lengths, kind="stable")
        return samples[order], lengths[order]

    def _split_packed(self, samples: np.ndarray, slots: int) -> tuple[list[list[int]], list[int]]:
        """Longest first, into the lightest slot that has room: a packed row costs its number of tokens."""
        members: list[list[int]] = [[] for _ in range(slots)]
        room = -(-len(samples) // slots)
        loads = [0] * slots
        open_slots = [(0, slot) for slot in range(slots)]  # a heap; a whole split has thousands of slots
        for sample, length in zip(*self._longest_first(samples), strict=True):
            load, slot = heapq.heappop(open_slots)
            members[slot].append(int(sample))
            loads[slot] = load + int(length)
            if len(members[slot]) < room:
                heapq.heappush(open_slots, (loads[slot], slot))
        return members, loads

    def _split_padded(self, samples: np.ndarray, slots: int) -> tuple[list[list[int]], list[int]]:
        """Neighbours in length share a slot: padded rows all cost what the longest costs."""
        ordered, lengths = self._longest_first(samples)
        members = [[int(sample) for sample in part] for part in np.array_split(ordered, slots)]
        longest = [int(max(part, default=0)) for part in np.array_split(lengths, slots)]
        return members, [len(m) * most for m, most in zip(members, longest, strict=True)]

    def _split_trees(self, samples: np.ndarray, slots: int) -> tuple[list[list[int]], list[int]]:
        """Samples in the order of their tokens, cut into slots of about equal trees.

        A sample costs the tokens that it does not share with the one before it in its slot. A slot takes
        at most the samples of a micro-batch, and as many as the slots behind it could not take.
        """
        rows = self.store.rows(samples)
        order = in_order(rows)
        ordered = [rows[index] for index in order]
        shared = shared_lengths(ordered)
        own = np.array([len(row) for row in ordered], dtype=np.int64) - shared
        members: list[list[int]] = []
        cost: list[int] = []
        place = 0
        for slot in range(slots):
            left = len(ordered) - place
            least = max(0, left - (slots - slot - 1) * self.micro_batch)
            fair = own[place:].sum() / (slots - slot)
            taken: list[int] = []
            load = 0
            while place < len(ordered) and len(taken) < self.micro_batch:
                if len(taken) >= least and load >= fair:
                    break
                load += int(own[place]) if taken else len(ordered[place])
                taken.append(int(samples[order[place]]))
                place += 1
            members.append(taken)
            cost.append(load)
        return members, cost

    def describe(self) -> str:
        """Says the arithmetic of the batches in one line."""
        return (
            f"global batch {self.global_batch} = {self.world} ranks x {self.accumulation} accumulation x "
            f"micro-batch {-(-self.global_batch // (self.world * self.accumulation))}"
        )
