"""`--plan` of growing windows is about the rows that training makes, and splits them as it lays them out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from gdrt_ds.planning.plan import plan_run
from gdrt_ds.training.preparation import prepare
from tests.data.test_growing import settings, table
from tests.models.family_models import make_family


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return table(tmp_path_factory.mktemp("log"), num_users=20)


def data_line(config) -> tuple[str, object]:
    """The line of `--plan` about the data, and the train split that it is about."""
    prepared = prepare(config)
    return next(iter(plan_run(config, prepared, 2).lines())), prepared.stores["train"]


def test_the_plan_counts_the_tokens_of_the_rows_of_the_first_steps(log, tmp_path):
    line, store = data_line(settings(log, tmp_path, "train.epochs=3", "train.block_samples=4"))
    # The steps of the plan, taken from the order of the epochs by hand: 8 steps of 8 samples.
    rows = np.concatenate([store.order(0), store.order(1)])[:64]
    lengths = np.array([len(store.row(int(row))) for row in rows])
    assert lengths.max() < store.sliding.lengths.max(), "a block of four is shorter than ten items"
    found = re.search(r"(\d+) tokens on average \(longest (\d+)\) in the first 8 step\(s\)", line)
    assert found, line
    assert (int(found[1]), int(found[2])) == (round(lengths.mean()), lengths.max())


def test_a_run_of_fewer_steps_is_planned_from_those_it_has(log, tmp_path):
    line, store = data_line(settings(log, tmp_path, "train.max_steps=2"))
    lengths = np.array([len(store.row(int(row))) for row in store.order(0)[:16]])
    assert f"(longest {lengths.max()}) in the first 2 step(s)" in line


def test_the_plan_of_sliding_windows_counts_all_of_them(log, tmp_path):
    line, store = data_line(settings(log, tmp_path, "data.windows=sliding"))
    assert f"{store.lengths.mean():.0f} tokens on average (longest {store.lengths.max()}), " in line


def steps_of(config) -> tuple[str, list[list[list[int]]]]:
    """The packing of a plan for two ranks, and the members of every slot of its first three steps."""
    plan = plan_run(config, prepare(config), 2)
    steps = [plan.batches.step(step) for step in range(3)]
    return plan.packing[0], [[list(members) for slots in step for members in slots] for step in steps]


@pytest.mark.parametrize("windows", ["growing", "sliding"])
@pytest.mark.parametrize(
    "family, setting, packing",
    [("lfm2", "train.packing=auto", "none"), ("llama", "model.attention=flash_attention_2", "packed")],
)
def test_where_auto_gives_a_tree_up_the_plan_is_that_of_the_packing_it_took(
    log, tmp_path, windows, family, setting, packing
):
    """Padded rows share a slot with rows of their length; in the order of a tree they do not."""
    path = make_family(family, tmp_path)
    shared = [f"model.path={path}", f"data.windows={windows}", "prompt.max_length=600"]
    chosen, found = steps_of(settings(log, tmp_path, *shared, setting))
    assert chosen == packing
    assert found == steps_of(settings(log, tmp_path, *shared, f"train.packing={packing}"))[1]
    if windows == "growing":
        trees = steps_of(settings(log, tmp_path, f"model.path={make_family('llama', tmp_path)}", shared[1]))
        assert trees[0] == "prefix_tree" and trees[1] != found
        for tree, other in zip(trees[1], found, strict=True):
            assert sorted(sum(tree, [])) == sorted(sum(other, [])), "the samples of a step stay"
