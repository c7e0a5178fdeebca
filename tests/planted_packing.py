"""Planted errors in how a packing is measured and planned: (what, test, changes) of each."""

from __future__ import annotations

PLANTED = [
    (
        "the probe of packed rows stands in another order in a prefix tree",
        "training/test_leak_check.py::test_in_every_packing_a_stands_before_b_and_c_behind_it"
        "[prefix_tree-272]",
        (("training/leak_check.py", "probe", "place * third", "(2 - place) * third"),),
    ),
    (
        "steps are split for a tree where windows grow, however rows are laid out",
        "planning/test_plan_growing.py::"
        "test_where_auto_gives_a_tree_up_the_plan_is_that_of_the_packing_it_took"
        "[lfm2-train.packing=auto-none-growing]",
        (
            (
                "training/preparation.py",
                "plan_batches",
                'trees = packing == "prefix_tree"',
                'trees = config.data.windows == "growing"',
            ),
        ),
    ),
    (
        "auto takes a prefix tree whatever it costs",
        "planning/test_packing_choice.py::test_prompts_of_their_own_share_the_fixed_words_only",
        (
            (
                "training/preparation.py",
                "packing_of",
                '> TREE_PAYS * tokens["shared_prefix"]',
                '> 2 * tokens["padded"]',
            ),
        ),
    ),
    (
        "auto tears the blocks of growing windows",
        "config/test_derived.py::"
        "test_in_a_tree_of_growing_windows_auto_is_as_many_samples_as_four_blocks[None-320-1-32]",
        (
            (
                "config/derived.py",
                "micro_batch_size",
                "max(AUTO_ROWS, AUTO_BLOCKS * block_samples(config))",
                "AUTO_ROWS",
            ),
        ),
    ),
]
