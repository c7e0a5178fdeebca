"""A served history is cut as in training: to its newest `data.history_length` titles."""

from __future__ import annotations

import json

import pytest

from gdrt_ds.inference.recommender import open_run
from gdrt_ds.inference.recommending import recommend
from gdrt_ds.recommend import main
from gdrt_ds.runtime import Runtime
from gdrt_ds.serving.worker import Worker
from tests.eval.run_folders import make_run

pytestmark = pytest.mark.slow

KEPT = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("served") / "run", [f"data.history_length={KEPT}"])


@pytest.fixture(scope="module")
def recommender(run):
    return open_run(run, Runtime())


@pytest.fixture(scope="module")
def titles(recommender):
    return [entry.text for entry in recommender.catalogue.entries[:8]]


def test_the_prompt_has_the_newest_titles_and_counts_the_others(recommender, titles):
    encoded = recommender.encode_titles(titles)
    assert encoded.input_ids.tolist() == recommender.encoder.encode(titles[-KEPT:]).input_ids.tolist()
    assert encoded.num_dropped == len(titles) - KEPT
    assert recommender.prompt_of_titles(titles) == recommender.prompt_of_titles(titles[-KEPT:])
    assert recommender.encode_titles(titles[:2]).num_dropped == 0


def test_the_service_answers_for_the_newest_titles_and_says_how_many_it_dropped(recommender, titles):
    (expected,) = recommend(recommender, [titles[-KEPT:]], 5)
    worker = Worker(recommender)
    future = worker.submit(titles, 5)
    worker.start()
    worker.stop()
    answer = future.result()
    assert answer.dropped == len(titles) - KEPT
    assert [row["item_id"] for row in answer.recommendations] == [row["item_id"] for row in expected]
    assert [row["log_prob"] for row in answer.recommendations] == pytest.approx(
        [row["log_prob"] for row in expected], abs=1e-6
    )


def test_the_command_says_once_that_histories_are_cut(run, titles, capsys, tmp_path):
    file = tmp_path / "histories.txt"
    file.write_text("\n".join(["; ".join(titles), titles[0], "; ".join(titles[-5:])]), encoding="utf-8")
    main(["--run", str(run), "--file", str(file), "--k", "4", "--json"])
    output = capsys.readouterr()
    found = [json.loads(line) for line in output.out.splitlines()]
    assert [answer["dropped"] for answer in found] == [5, 0, 2]
    assert [row["item_id"] for row in found[0]["recommendations"]] == [
        row["item_id"] for row in found[2]["recommendations"]
    ]
    assert output.err.count("note: 2 of 3 histories lose their oldest titles, 7 in all") == 1
    assert f"data.history_length={KEPT}" in output.err
    main(["--run", str(run), "--history", titles[0], "--json"])
    assert "lose their oldest" not in capsys.readouterr().err
