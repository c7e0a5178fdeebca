"""A metric in one file: how much of the lists is less popular than the median item.

Put the file into eval/metrics/. `METRICS` is what the table of metrics looks for. Intervals, paired
comparisons, the tables of the report and the value of the test targets beside it follow from the
`Statistic`.
"""

import numpy as np

from eval.intervals import Statistic, mean_statistic
from eval.metrics.base import item_metric
from eval.metrics.inputs import Inputs
from eval.metrics.item_side import mean_over_list


def rare_share(inputs: Inputs, k: int) -> Statistic:
    """Mean over samples of the share of the top-k list with at most the median train count."""
    rare = inputs.train_count <= np.median(inputs.train_count)
    return mean_statistic(mean_over_list(inputs, k, rare.astype(float)), bounds=(0, 1))


METRICS = (item_metric("rare_share@{k}", rare_share, "share of the list in the less popular half", None),)
