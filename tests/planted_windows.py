"""Planted errors in windows that grow: (what, test, changes) of each."""

from __future__ import annotations

PLANTED = [
    (
        "growing windows: a history holds its own target and the item after it",
        "data/test_growing_files.py::test_no_history_holds_its_target_or_an_item_after_it",
        (
            (
                "data/growing.py",
                "GrowingWindows.history",
                "begin + self.place_of[sample]]",
                "begin + self.place_of[sample] + 2]",
            ),
        ),
    ),
    (
        "growing windows: a gap in a user's windows is closed over the missing item",
        "data/test_growing_files.py::test_histories_are_unbroken_stretches_of_the_user_s_own_sequence",
        (("data/growing.py", "_runs_of", "if not _continues(items, history, longest):", "if not items:"),),
    ),
    (
        "growing windows: nobody compares their targets with the train windows",
        "data/test_growing_files.py::"
        "test_growing_windows_with_other_targets_than_the_train_windows_are_an_error",
        (
            (
                "data/growing.py",
                "GrowingStore.__init__",
                "_check_targets(windows, sliding.windows.targets, catalogue)",
                "pass",
            ),
        ),
    ),
]
