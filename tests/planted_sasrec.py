"""Planted errors in the SASRec floor: (what, test, changes) of each."""

from __future__ import annotations

PLANTED = [
    (
        "SASRec sees later items",
        "eval/test_sasrec.py::test_a_score_does_not_depend_on_later_items",
        (("eval/sasrec/model.py", "SASRec.states", "mask=later", "mask=None"),),
    ),
    (
        "SASRec trains on valid targets",
        "eval/test_sasrec.py::test_no_valid_or_test_target_is_trained_on_or_read_in_training",
        (
            (
                "eval/sasrec/sequences.py",
                "sequences_of",
                'train = entries(corpus.splits["train"])',
                'train = entries(corpus.splits["train"] + corpus.splits["valid"])',
            ),
        ),
    ),
    (
        "SASRec keeps its last epoch",
        "eval/test_sasrec.py::test_early_stopping_keeps_the_weights_of_the_epoch_that_was_best_on_valid",
        (("eval/sasrec/training.py", "Training.run_epoch", "nll < self.best_nll", "nll > 0"),),
    ),
]
