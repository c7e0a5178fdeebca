"""Trained rows of added tokens on two ranks: ZeRO-3 gives the losses and the saved rows of ZeRO-1."""

import pytest

from tests.forked import run_scenario

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_scenario("scenario_token_rows", tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("heads", ["tied_True", "tied_False"])
def test_sharded_rows_train_as_whole_ones(report, heads):
    sharded, whole = report[heads]["stage3"], report[heads]["stage1"]
    for rank in (0, 1):
        assert sharded[rank][0] == pytest.approx(whole[rank][0], rel=1e-5)
        assert sharded[rank][0][-1] < sharded[rank][0][0]
    rows, wanted = sharded[0][1], whole[0][1]
    assert set(rows) == set(wanted) and len(rows) == (1 if heads == "tied_True" else 2)
    for name in rows:
        assert len(rows[name]) == 3
        for mine, theirs in zip(rows[name], wanted[name], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
