"""`train.micro_batch=auto` is a rank's share up to a limit, which is larger in a tree of growing windows."""

import pytest

from gdrt_ds.config import RunConfig, block_samples, micro_batch_size


def config(windows="sliding", **train) -> RunConfig:
    return RunConfig.model_validate(
        {"data": {"windows": windows, "history_length": 10, "min_history": 3}, "train": train}
    )


@pytest.mark.parametrize("global_batch, world, samples", [(32, 1, 8), (12, 2, 6), (7, 2, 4), (3, 4, 1)])
def test_auto_is_a_ranks_share_and_at_most_eight_samples(global_batch, world, samples):
    assert micro_batch_size(config(global_batch=global_batch), world, "auto") == samples


@pytest.mark.parametrize(
    "block, global_batch, world, samples",
    [
        (None, 320, 1, 32),
        (None, 320, 4, 32),
        (None, 40, 2, 20),
        (5, 320, 1, 20),
        (5, 12, 1, 12),
        (1, 320, 1, 8),
    ],
)
def test_in_a_tree_of_growing_windows_auto_is_as_many_samples_as_four_blocks(
    block, global_batch, world, samples
):
    """Eight samples would tear every block of more: what a block shares is shared within a forward only."""
    growing = config("growing", global_batch=global_batch, block_samples=block)
    assert block_samples(growing) == (block or 8)
    assert micro_batch_size(growing, world, "auto") == samples
    assert micro_batch_size(growing, world, "prefix_tree") == samples


@pytest.mark.parametrize("packing", ["none", "packed", "shared_prefix"])
def test_rows_that_share_no_history_are_eight_whatever_the_windows(packing):
    assert micro_batch_size(config("growing", global_batch=320), 1, packing) == 8


def test_a_number_is_taken_as_it_is():
    assert micro_batch_size(config("growing", global_batch=320, micro_batch=7), 1, "auto") == 7
