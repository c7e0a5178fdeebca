"""Settings that follow from others: the targets of a block, and what `train.micro_batch=auto` means."""

from __future__ import annotations

from gdrt_ds.config.sections import RunConfig

AUTO_ROWS = 8
"""Samples of a forward under `train.micro_batch=auto`."""
AUTO_BLOCKS = 4
"""In a prefix tree, as many samples as so many blocks have: ten of a block cost about what two do alone."""


def block_samples(config: RunConfig) -> int:
    """Targets of a block: `train.block_samples`, or as many as `data.history_length` has room for."""
    most = config.data.history_length - config.data.min_history + 1
    return config.train.block_samples or most


def micro_batch_size(config: RunConfig, world: int, packing: str) -> int:
    """Returns the samples of a rank's forward.

    `auto` is the whole share of a rank, up to a limit. The limit is larger for growing windows in a prefix
    tree, because what a block shares is shared within a forward only.

    Args:
        world: number of ranks.
        packing: how the rows are laid out; `auto` stands for what it usually becomes.
    """
    if config.train.micro_batch != "auto":
        return int(config.train.micro_batch)
    most = AUTO_ROWS
    if config.data.windows == "growing" and packing in ("auto", "prefix_tree"):
        most = max(AUTO_ROWS, AUTO_BLOCKS * block_samples(config))
    return min(most, -(-config.train.global_batch // world))
