"""Settings that follow from others: the targets of a block, and what `train.micro_batch=auto` means."""

from __future__ import annotations

from gdrt_ds.config.sections import RunConfig

AUTO_ROWS = 8
"""Samples of a forward under `train.micro_batch=auto`."""
AUTO_BLOCKS = 4
"""Blocks of growing windows instead: a block of ten targets has about as many tokens as two samples have."""


def block_samples(config: RunConfig) -> int:
    """Targets of a block: `train.block_samples`, or as many as `data.history_length` has room for."""
    most = config.data.history_length - config.data.min_history + 1
    return config.train.block_samples or most


def micro_batch_size(config: RunConfig, world: int) -> int:
    """Returns the samples of a rank's forward.

    `auto` is the whole share of a rank, up to a limit. With growing windows the limit is whole blocks,
    because what a block shares is shared within a forward only.

    Args:
        world: number of ranks.
    """
    if config.train.micro_batch != "auto":
        return int(config.train.micro_batch)
    most = AUTO_ROWS
    if config.data.windows == "growing":
        most = AUTO_BLOCKS * block_samples(config)
    return min(most, -(-config.train.global_batch // world))
