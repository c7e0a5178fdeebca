"""The service gives the lists of `recommend`, refuses what is wrong, and loses nothing that it accepted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import open_run
from gdrt_ds.inference.recommending import NoScores, recommend
from gdrt_ds.runtime import Runtime
from gdrt_ds.serving.running import listen, run_service
from gdrt_ds.serving.worker import Worker
from tests.eval.run_folders import make_run
from tests.serving.service_process import Client, serving

pytestmark = pytest.mark.slow

K = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serving") / "run")


@pytest.fixture(scope="module")
def recommender(run):
    return open_run(run, Runtime())


@pytest.fixture(scope="module")
def histories(recommender):
    """200 histories of 1 to 8 titles; some hold a title that the catalogue does not have."""
    titles = [entry.text for entry in recommender.catalogue.entries] + ["A film nobody knows; part 2"]
    draw = random.Random(0)
    return [draw.choices(titles, k=draw.randint(1, 8)) for _ in range(200)]


@pytest.fixture(scope="module")
def exact(recommender, histories):
    return recommend(recommender, histories, K)


def same_lists(answers, exact, tolerance):
    for answer, rows in zip(answers, exact, strict=True):
        found = answer["recommendations"]
        assert [row["item_id"] for row in found] == [row["item_id"] for row in rows]
        assert [row["rank"] for row in found] == list(range(1, K + 1))
        for row, expected in zip(found, rows, strict=True):
            assert abs(row["log_prob"] - expected["log_prob"]) <= tolerance
        assert answer["certified"] == K


def test_200_histories_asked_at_once_get_the_lists_of_recommend(recommender, histories, exact):
    with serving(recommender, max_queue=300) as (client, _):
        answers = client.ask(histories, K, clients=16)
        same_lists(answers, exact, 1e-5)
        _, _, numbers = client.request("GET", "/metrics")
    for answer, history in zip(answers, histories, strict=True):
        assert bool(answer["unknown"]) == any("nobody" in title for title in history)
    assert 'gdrt_requests_total{status="200"} 200.0' in numbers
    batches = float(numbers.split("gdrt_batch_size_count ")[1].split()[0])
    assert batches < 200  # requests that wait together are scored together


def test_refused_requests_are_counted(recommender):
    with serving(recommender, max_body_s=0.5) as (client, _):
        for body in (b" " * (1 << 20), b'{"history": ["\xff\xfe"]}', b"{", b'{"history": []}'):
            client.post(body)
        client.request("GET", "/v1/recommend")
        head = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
        assert b" 408 " in client.raw(head)
        _, _, page = client.request("GET", "/metrics")
    counted = dict(re.findall(r'gdrt_requests_total\{status="(\d+)"\} ([\d.]+)', page))
    assert counted == {"413": "1.0", "400": "1.0", "422": "2.0", "408": "1.0"}


def test_an_address_that_another_service_took_is_told():
    first, second = listen("127.0.0.1", 0), None
    try:
        second = listen("127.0.0.1", first.getsockname()[1])  # both are still loading their models
        first.listen()
        with pytest.raises(UserError, match="--port [0-9]+: cannot listen there"):
            run_service(None, second, print)
        with pytest.raises(UserError, match="--port [0-9]+: cannot listen there"):
            listen("127.0.0.1", first.getsockname()[1])
    finally:
        for place in filter(None, (first, second)):
            place.close()
    with pytest.raises(UserError, match="--host is empty"):
        listen("", 0)


def test_histories_that_are_scored_alone_have_the_same_scores_to_the_bit(recommender, histories):
    alone = recommend(recommender, histories[:40], K, batch_size=1)
    with serving(recommender, batch_size=1, max_queue=300) as (client, _):
        same_lists(client.ask(histories[:40], K, clients=16), alone, 0.0)


def test_the_usual_length_of_a_list_obeys_the_limit(recommender, histories):
    with serving(recommender, max_k=3) as (client, _):
        status, answer = client.post({"history": histories[0]})
        assert status == 200 and len(answer["recommendations"]) == 3
        assert client.post({"history": histories[0], "k": 4})[0] == 422


def bad_requests() -> list[tuple[bytes, int]]:
    """60 bodies and the status of their answer."""
    title = "x" * 400
    values = [
        ({}, 422),
        ({"history": []}, 422),
        ({"history": "Heat"}, 422),
        ({"history": None}, 422),
        ({"history": {"0": "Heat"}}, 422),
        ({"history": [1, 2]}, 422),
        ({"history": [None]}, 422),
        ({"history": [["Heat"]]}, 422),
        ({"history": [""]}, 422),
        ({"history": ["  \n\t "]}, 422),
        ({"history": [True]}, 422),
        ({"history": ["x" * 501]}, 422),
        ({"history": ["x"] * 201}, 422),
        ({"history": ["Heat"], "k": 0}, 422),
        ({"history": ["Heat"], "k": -1}, 422),
        ({"history": ["Heat"], "k": 101}, 422),
        ({"history": ["Heat"], "k": 10**30}, 422),
        ({"history": ["Heat"], "k": "10"}, 422),
        ({"history": ["Heat"], "k": 1.5}, 422),
        ({"history": ["Heat"], "k": True}, 422),
        ({"history": ["Heat"], "k": None}, 422),
        ({"history": ["Heat"], "k": float("nan")}, 422),
        ({"history": ["Heat"], "k": float("inf")}, 422),
        ({"history": ["Heat"], "extra": 1}, 422),
        ({"histories": [["Heat"]]}, 422),
        ({"history": [title] * 199 + [5]}, 422),
        ([], 422),
        (["Heat"], 422),
        ("Heat", 422),
        (5, 422),
        (None, 422),
        (True, 422),
    ]
    bodies = [(json.dumps(value).encode(), status) for value, status in values]
    bodies += [
        (b"", 422),
        (b"{", 422),
        (b'{"history": ["Heat"', 422),
        (b'{"history": ["Heat"],}', 422),
        (b"{'history': ['Heat']}", 422),
        (b"history=Heat", 422),
        (b'{"history": ["Heat"]} {}', 422),
        (b'{"history": ["\\ud800"]}', 422),
        (b'{"history": ["a\\udfffb"]}', 422),
        (b'{"history": ["\xff\xfe"]}', 400),
        (b"\xff\xfe{}", 422),
        (b"\x00" * 100, 422),
        (b"NaN", 422),
        (b'{"history": [NaN]}', 422),
        (b'{"history": [1e999]}', 422),
        (b"[" * 100_000, 400),
        (b'{"history":' * 50_000, 413),
        (b'{"history": ["' + b"x" * (10 << 20) + b'"]}', 413),
        (json.dumps({"history": ["Heat"] * (2 << 20)}).encode(), 413),
        (b" " * (1 << 20) + b"{}", 413),
    ]
    padding = 60 - len(bodies)
    return bodies + [(json.dumps({"history": ["Heat"], "k": 1000 + i}).encode(), 422) for i in range(padding)]


def test_60_bad_requests_get_a_clear_4xx_and_disturb_no_good_one(recommender, histories, exact):
    bad = bad_requests()
    assert len(bad) == 60
    with serving(recommender, max_queue=300) as (client, _):

        def send(body):
            start = time.monotonic()
            status, answer = client.post(body)
            return status, answer, time.monotonic() - start

        with ThreadPoolExecutor(24) as pool:
            sent = [pool.submit(send, body) for body, _ in bad]
            good = [pool.submit(client.post, {"history": history, "k": K}) for history in histories[:60]]
            answers = [future.result() for future in sent]
            found = [future.result() for future in good]
    for (body, expected), (status, answer, _) in zip(bad, answers, strict=True):
        assert status == expected, (body[:80], status, answer)
        assert set(answer) == {"error"} and 0 < len(answer["error"]) < 400
    assert all(status == 200 for status, _ in found)
    same_lists([answer for _, answer in found], exact[:60], 1e-5)


def test_wrong_paths_methods_and_what_is_no_http_are_refused(recommender):
    with serving(recommender) as (client, _):
        assert client.request("GET", "/v1/recommend")[0] == 405
        assert client.request("POST", "/v1/nothing", b"{}")[0] == 404
        assert client.request("DELETE", "/health")[0] == 405
        assert client.raw(b"\x16\x03\x01 no http at all\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert client.raw(b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000).startswith(b"HTTP/1.1 4")
        assert client.post({"history": ["Heat"], "k": 1})[0] == 200


def test_a_body_that_does_not_come_is_given_up(recommender):
    with serving(recommender, max_body_s=0.3) as (client, _):
        head = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        answer = client.raw(head + b'content-length: 100\r\n\r\n{"history"')
        assert answer.startswith(b"HTTP/1.1 408")
        sent = client.raw(head + b'transfer-encoding: chunked\r\n\r\n5\r\n{"his\r\n')
        assert sent.startswith(b"HTTP/1.1 408")


def test_a_flood_is_answered_with_503_and_what_was_accepted_is_right(recommender, histories, exact):
    with serving(recommender, batch_size=1, max_queue=2) as (client, _):
        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(lambda h: client.request("POST", "/v1/recommend", body_of(h)), histories))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 503}
        refused = next(answer for answer in answers if answer[0] == 503)
        assert refused[1]["retry-after"] == "1" and "2 requests are waiting" in refused[2]
        kept = [i for i, status in enumerate(statuses) if status == 200]
        same_lists([json.loads(answers[i][2]) for i in kept], [exact[i] for i in kept], 1e-5)
        assert client.request("GET", "/health")[0] == 200


def body_of(history) -> bytes:
    return json.dumps({"history": history, "k": K}).encode()


def test_a_request_that_waited_too_long_is_told_so(recommender, histories):
    with serving(recommender, max_wait_s=1e-9) as (client, _):
        status, answer = client.post({"history": histories[0]})
    assert status == 503 and answer["error"].startswith("waited more than")


def test_a_strict_service_refuses_titles_that_the_catalogue_lacks(recommender):
    title = recommender.catalogue.entries[0].text
    with serving(recommender, strict=True) as (client, _):
        assert client.post({"history": [title], "k": 3})[0] == 200
        status, answer = client.post({"history": [title, "Nothing like it"], "k": 3})
        assert (
            status == 422 and answer["error"] == "1 titles are not in the catalogue, e.g. 'Nothing like it'"
        )


def test_a_list_longer_than_the_catalogue_is_the_catalogue(recommender):
    with serving(recommender) as (client, _):
        _, answer = client.post({"history": ["Heat"], "k": 100})
        _, _, info = client.request("GET", "/v1/info")
    assert len(answer["recommendations"]) == answer["certified"] == len(recommender.catalogue)
    assert sum(row["probability"] for row in answer["recommendations"]) == pytest.approx(1, abs=1e-6)
    assert json.loads(info)["titles"] == len(recommender.catalogue)


def test_a_failing_request_fails_alone_and_unknown_titles_are_not_kept(recommender, histories, exact, caplog):
    worker = Worker(recommender)
    futures = [worker.submit(history, K) for history in ([5], histories[0], ["new " * 20])]
    worker.start()
    worker.stop()
    assert isinstance(futures[0].exception(), Exception)
    assert futures[1].result().recommendations[0]["item_id"] == exact[0][0]["item_id"]
    assert futures[2].result().unknown == ["new " * 20]
    assert "new " * 20 not in recommender.encoder._items
    assert "a prompt could not be made" in caplog.text and "Traceback" in caplog.text


def test_scores_that_are_nan_are_answered_with_500_and_others_are_not_touched(run, histories, exact, caplog):
    broken = open_run(run, Runtime())
    unknown = "Nobody; part 7"
    tokens = set(broken.prompt_of_titles([unknown])) - set(broken.prompt_of_titles([]))
    tokens -= set(broken.trie.token.tolist())
    for history in histories[:6]:
        tokens -= set(broken.prompt_of_titles(history))
    with torch.no_grad():
        broken.loaded.model.get_input_embeddings().weight[sorted(tokens)] = torch.nan
    worker = Worker(broken)
    futures = [worker.submit(history, K) for history in (*histories[:6], [unknown])]
    worker.start()
    worker.stop()
    for future, rows in zip(futures[:-1], exact):
        found = future.result().recommendations
        assert [row["item_id"] for row in found] == [row["item_id"] for row in rows]
    assert isinstance(futures[-1].exception(), NoScores)
    assert "the model failed on a request" in caplog.text and "Traceback" in caplog.text
    with serving(broken) as (client, _):
        status, answer = client.post({"history": [unknown], "k": K})
        assert status == 500 and "the model gives NaN for " in answer["error"]
        assert client.post({"history": histories[0], "k": K})[0] == 200
    with pytest.raises(NoScores, match="so nothing can be ranked"):
        recommend(broken, [[unknown]], K)


def test_names_of_items_are_scored_by_the_texts_that_stand_for_them(run):
    named = open_run(run, Runtime())
    entries = named.catalogue.entries
    entries[0].name, entries[0].merged_ids = "Heat (1995) / Alien (1979)", ["1", "2"]
    entries[1].name, entries[2].name = "Up (2009)", "Twin"
    entries[3].name = "Twin"
    history = [entries[1].text, entries[0].text]
    (expected,) = recommend(named, [history], K)
    with serving(named, strict=True) as (client, _):
        for given in (["Up (2009)", "Alien (1979)"], ["Up (2009)", entries[0].name], history):
            status, answer = client.post({"history": given, "k": K})
            assert status == 200 and answer["unknown"] == []
            same_lists([answer], [expected], 1e-5)
        status, answer = client.post({"history": ["Twin"], "k": K})
        assert status == 422 and "'Twin', and 2 items with different texts have it" in answer["error"]
        status, answer = client.post({"history": ["Twins"], "k": K})
        assert status == 422 and "1 titles are not in the catalogue" in answer["error"]


def test_sigterm_answers_what_was_accepted_and_ends_with_status_0(run, histories, exact):
    command = [sys.executable, "-m", "gdrt_ds.serve", "--run", str(run), "--port", "0", "--batch-size", "1"]
    process = subprocess.Popen(
        [*command, "--max-queue", "300"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        line = next(line for line in process.stderr if line.startswith("ready: "))
        client = Client(int(line.rsplit(":", 1)[1]))
        with ThreadPoolExecutor(40) as pool:
            sent = [pool.submit(client.post, {"history": history, "k": K}) for history in histories]
            while json.loads(client.request("GET", "/health")[2])["waiting"] < 5:
                assert not all(future.done() for future in sent)
            process.send_signal(signal.SIGTERM)
            answers = []
            for future in sent:
                try:
                    answers.append(future.result())
                except OSError:
                    answers.append(None)  # it came when the door was closed
        said = process.stderr.read()
        assert process.wait(timeout=60) == 0, said
    finally:
        process.kill()
    assert "everything that was accepted is answered" in said
    accepted = [i for i, answer in enumerate(answers) if answer is not None]
    assert len(accepted) > 5
    assert all(answers[i][0] == 200 for i in accepted)
    same_lists([answers[i][1] for i in accepted], [exact[i] for i in accepted], 1e-5)
