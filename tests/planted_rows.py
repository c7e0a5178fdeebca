"""Planted errors in rows of prompt and completion, and in texts of items: (what, test, changes) of each."""

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
                "data/token_facts.py",
                "ByEntry._cases",
                "self.offsets[self.entry_of[owner]] + place",
                "self.offsets[self.entry_of[owner]]",
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
                "rows_of = Counter(row.user_id for row in rows)",
                "rows = [replace(row, user_id=str(place)) for place, row in enumerate(rows)]\n"
                "    rows_of = Counter(row.user_id for row in rows)",
            ),
        ),
    ),
    (
        "rows: equal rows are dealt to several splits",
        "data/test_sft.py::test_equal_rows_stay_in_one_split_and_others_are_dealt_as_without_them",
        (("data/readers/sft.py", "_shares", "if rows_of[row.user_id] == 1 else", "if False else"),),
    ),
    (
        "data: rows that are longer than the header of a CSV file shift the columns",
        "data/test_log_columns.py::test_rows_that_are_all_longer_than_the_header_do_not_shift_the_columns",
        (("data/readers/_rows.py", "begins_too_long", "len(first) > len(header)", "False"),),
    ),
    (
        "rows: a mixture forgets the part of a weight below one",
        "data/test_mixture.py::test_weights_are_about_train_and_every_row_says_where_it_comes_from",
        (("data/mixture.py", "weighted", "rest = round((weight - whole) * len(rows))", "rest = 0"),),
    ),
    (
        "rows: users of two data sets are one",
        "data/test_mixture.py::test_users_of_two_data_sets_are_two",
        (("data/mixture.py", "_labelled", 'f"{name}/{row.user_id}"', "row.user_id"),),
    ),
    (
        "rows: a study takes the best value of a label for the worst",
        "studies/test_study_rows.py::test_the_worst_value_of_a_label_is_that_of_the_evaluation",
        (
            (
                "eval/study/rows_of_text.py",
                "statistics_of_rows",
                'shown[f"{measure} worst {label}"] = summary["worst"]',
                'shown[f"{measure} worst {label}"] = summary["best"]',
            ),
        ),
    ),
    (
        "item texts: the text of an item is its title whatever column is named",
        "data/test_item_text.py::test_a_column_of_the_item_table_is_the_text_and_the_title_stays_the_name",
        (
            (
                "data/readers/table.py",
                "text_columns",
                "return data.item_text, title_column",
                "return title_column or data.item_text, title_column",
            ),
        ),
    ),
    (
        "item texts: all new tokens begin in the same row",
        "data/test_item_text.py::test_a_base_with_new_tokens_has_the_old_rows_and_drawn_ones",
        (
            (
                "models/new_tokens.py",
                "_with_rows",
                "rows_VH.mean(0) + rows_VH.std(0) * noise_nH",
                "rows_VH.mean(0) + 0.0 * noise_nH",
            ),
        ),
    ),
]
