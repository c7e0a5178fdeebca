"""The HTTP service under a bounded load, against the scorer that it uses, called directly.

    python benchmarks/serve_load.py [--run RUN] [--clients 16] [--requests 200] [--json] [--quick]

The service is a process of its own (gdrt_ds.serve) on the loop-back address. The clients are threads here,
each with one request at a time: at most `--clients` requests wait. The same histories are measured in turns:
    throughput        histories per second of all clients, against gdrt_ds.recommend with equal batches
    latency, alone    median seconds of one client's request, against scoring one history
    latency, loaded   median and 95th percentile with all clients, against the least that queueing allows:
                      clients / (histories per second of the scorer)
Every list is compared with the scorer's before anything is timed. Without --run, a run on generated data is
made: an untrained adapter on SmolLM2-135M, with --quick on a tiny random model.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from machine_line import machine

K = 10


def make_run(folder: Path, quick: bool) -> Path:
    """A run folder with an adapter of random weights: what it recommends does not matter here."""
    from gdrt_ds.config import dump_config, load_config
    from gdrt_ds.models.load import load_model
    from gdrt_ds.runtime import Runtime
    from gdrt_ds.training.preparation import prepare

    sizes = "{num_items: 200, num_train: 400, num_valid: 20, num_test: 20}"
    model = "tiny-random" if quick else "smollm2-135m"
    words = ["data.path=planted", f"data.planted={sizes}", f"model.path={model}", f"run.dir={folder}"]
    config = load_config(None, [*words, "model.quantization=none", "model.dtype=float32"])
    folder.mkdir()
    prepared = prepare(config)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    prepared.data.save(folder)
    loaded = load_model(config.model, Runtime(), train=True, path=prepared.model_folder)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    loaded.model.save_pretrained(folder / "adapter")
    prepared.tokenizer.save_pretrained(folder / "adapter")
    return folder


class Service:
    """The service as a process, while the block runs."""

    def __init__(self, run: Path, batch_size: int, clients: int):
        command = [sys.executable, "-m", "gdrt_ds.serve", "--run", str(run), "--port", "0"]
        command += ["--batch-size", str(batch_size), "--max-queue", str(2 * clients)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        self.port = 0

    def __enter__(self) -> Service:
        for line in self.process.stderr:
            if line.startswith("ready: "):
                self.port = int(line.rsplit(":", 1)[1])
                return self
        raise SystemExit("the service did not start; run it by hand: python -m gdrt_ds.serve --run ...")

    def __exit__(self, *exc) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


class Client:
    """One connection that is kept."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def ask(self, history: list[str]) -> tuple[float, list[dict]]:
        """Returns the seconds of a request and its list."""
        body = json.dumps({"history": history, "k": K})
        start = time.perf_counter()
        self.connection.request("POST", "/v1/recommend", body, {"content-type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"status {answer.status}: {text.decode()[:200]}")
        return time.perf_counter() - start, json.loads(text)["recommendations"]


def load(port: int, histories: list[list[str]], clients: int) -> tuple[float, list[float], list[list[dict]]]:
    """Returns the seconds of all requests together, of each, and the lists."""
    own = threading.local()

    def one(history):
        if not hasattr(own, "client"):
            own.client = Client(port)
        return own.client.ask(history)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, histories))
    return time.perf_counter() - start, [seconds for seconds, _ in found], [rows for _, rows in found]


def compare(run: Path, options) -> list[dict]:
    from gdrt_ds.inference.recommender import open_run
    from gdrt_ds.inference.recommending import recommend
    from gdrt_ds.runtime import single_process_runtime

    recommender = open_run(run, single_process_runtime())
    titles = [entry.text for entry in recommender.catalogue.entries]
    draw = random.Random(0)
    histories = [draw.choices(titles, k=draw.randint(3, 10)) for _ in range(options.requests)]

    def score(some, batch_size):
        start = time.perf_counter()
        found = recommend(recommender, some, K, batch_size)
        return time.perf_counter() - start, found

    few = histories[: max(8, options.requests // 8)]
    rounds = []
    with Service(run, options.batch_size, options.clients) as service:
        expected = score(histories, options.batch_size)[1]
        found = load(service.port, histories, options.clients)[2]
        check_lists(found, expected)
        for _ in range(options.rounds):
            direct = score(histories, options.batch_size)[0]
            spent, latencies, _ = load(service.port, histories, options.clients)
            alone = score(few, 1)[0] / len(few)
            single = statistics.median(load(service.port, few, 1)[1])
            rounds.append((direct, spent, latencies, alone, single))
    n = len(histories)
    direct, spent, alone, single = (statistics.median(r[i] for r in rounds) for i in (0, 1, 3, 4))
    latencies = sorted(seconds for r in rounds for seconds in r[2])
    least = options.clients * direct / n
    shape = (
        f"{len(titles)} titles, {n} requests, {options.clients} clients, batches of {options.batch_size}, "
        f"{options.rounds} rounds"
    )
    rows = [
        ("throughput, histories per s", n / spent, n / direct),
        ("latency alone, median s", single, alone),
        ("latency loaded, median s", statistics.median(latencies), least),
        ("latency loaded, 95th percentile s", latencies[int(0.95 * (len(latencies) - 1))], least),
    ]
    return [
        {
            "name": name,
            "ours": ours,
            "floor": floor,
            "ratio": ours / floor,
            "shape": shape,
            "machine": machine(),
        }
        for name, ours, floor in rows
    ]


def check_lists(found: list[list[dict]], expected: list[list[dict]]) -> None:
    """Ends the script if the service recommends anything else than the scorer."""
    for rows, others in zip(found, expected, strict=True):
        for row, other in zip(rows, others, strict=True):
            if row["item_id"] != other["item_id"] or abs(row["log_prob"] - other["log_prob"]) > 1e-4:
                raise SystemExit(f"the service lists {row}, the scorer {other}: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder; left out, one is made")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 60 requests, one round")
    options = parser.parse_args()
    if options.quick:
        options.requests = min(options.requests, 60)
        options.rounds = 1
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or make_run(Path(folder) / "run", options.quick)
        rows = compare(run, options)
    for row in rows:
        if options.json:
            print(json.dumps(row))
        else:
            print(f"{row['name']:34s} {row['ours']:9.4g}  against {row['floor']:9.4g}: {row['ratio']:.2f}")
    if not options.json:
        print(f"{rows[0]['shape']}; {rows[0]['machine']}")


if __name__ == "__main__":
    main()
