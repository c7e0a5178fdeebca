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
]
