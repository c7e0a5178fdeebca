"""Planted errors in what handles rows of prompt and completion: (what, test, changes) of each."""

from __future__ import annotations

PLANTED = [
    (
        "rows: the end of text has the label of the last span",
        "data/test_sft.py::test_a_token_has_the_label_of_its_span_and_the_end_of_text_is_outside",
        (
            (
                "data/row_prompts.py",
                "RowEncoder.token_labels",
                "return [*labels, OUTSIDE]",
                "return [*labels, labels[-1]]",
            ),
        ),
    ),
    (
        "rows: relevance is looked up by entry alone",
        "dro/test_groups.py::test_relevance_of_a_token_is_looked_up_by_entry_and_place",
        (
            (
                "data/training_data.py",
                "Auxiliary.per_token",
                "index = np.repeat(starts - store.target_offsets[:-1], store.num_target)",
                "index = np.repeat(starts, store.num_target) - np.arange(store.target_offsets[-1])",
            ),
        ),
    ),
    (
        "rows: an answer that shares the highest score counts whole",
        "eval/test_rows.py::test_equal_scores_share_the_hit_and_scores_that_are_no_numbers_miss",
        (("eval/rows/predict.py", "judge", "float(answer in best) / len(best)", "float(answer in best)"),),
    ),
    (
        "rows: the best group stands for the worst",
        "eval/test_rows.py::test_metrics_by_hand",
        (("eval/rows/metrics.py", "_calibrated_worst", "np.nanmax", "np.nanmin"),),
    ),
    (
        "rows: rows of one user are dealt to several splits",
        "data/test_sft.py::test_rows_of_one_user_stay_in_one_split",
        (
            (
                "data/readers/sft.py",
                "_shares",
                "users = list(dict.fromkeys(row.user_id for row in rows))",
                "rows = [replace(row, user_id=str(place)) for place, row in enumerate(rows)]\n"
                "    users = list(dict.fromkeys(row.user_id for row in rows))",
            ),
        ),
    ),
]
