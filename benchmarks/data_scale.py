"""What a log's size costs, from 1 to 25 million interactions: time to the first step, time of a step, memory.

    python benchmarks/data_scale.py [--millions 1 5 25] [--old-up-to 1] [--json] [--quick]

Each row is a whole training of its own process: a generated log with 60,000 items (CSV), a tiny random model,
GDRT with relevance groups, a few steps. `first` starts with an empty cache and `again` with the one that
`first` left. `old` computes with the references of the tests instead: one Python object per event and per
window, all tokens in one array. Peak memory is the resident set that the kernel counts, pages of mapped files
included. CPU seconds are those of the process; on a shared machine they say more than the time of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS = 12
NUM_ITEMS = 60_000
EVENTS_PER_USER = 40
MIB = 1 << 20


def write_log(folder: Path, num: int, num_items: int = NUM_ITEMS) -> None:
    """interactions.csv and items.csv: users' events at random times, items with a long tail."""
    import pyarrow
    import pyarrow.csv

    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["user", "item", "timestamp"]
    schema = pyarrow.schema([(name, pyarrow.int64()) for name in names])
    with pyarrow.csv.CSVWriter(folder / "interactions.csv", schema) as writer:
        for start in range(0, num, 1_000_000):
            size = min(1_000_000, num - start)
            columns = [
                rng.integers(0, num // EVENTS_PER_USER, size),
                (num_items * rng.random(size) ** 2).astype(np.int64),
                rng.integers(800_000_000, 1_600_000_000, size),
            ]
            writer.write(pyarrow.table([pyarrow.array(column) for column in columns], schema=schema))
    words = "red green blue old new long short dark light lost".split()
    lines = [f"{k},{words[k % 10]} {words[k // 10 % 10]} story {k // 100}\n" for k in range(num_items)]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(lines), encoding="utf-8")


def settings(log: Path, run: Path) -> list[str]:
    return [
        f"data.path={log}",
        "data.limit_valid=64",
        f"run.dir={run}",
        "run.overwrite=true",
        "model.path=tiny-random",
        "model.quantization=none",
        "prompt.template=plain",
        "objective=gdrt",
        "groups.binning=uniform",
        f"train.max_steps={STEPS}",
        "train.global_batch=16",
    ]


def use_the_references() -> None:
    """Puts the computations that were replaced back: objects for events and windows, all tokens laid out."""
    from gdrt_ds.data import corpus, recommendation
    from gdrt_ds.data.readers import _columns
    from gdrt_ds.data.readers.base import BadRows
    from tests.data import reference_tokens, reference_windows
    from tests.data.as_lists import as_lists

    def row_by_row(*given: Any) -> None:
        raise _columns.NotPlain("the replaced computation is asked for")

    _columns.read_columns = row_by_row
    corpora = {}

    def load_corpus(data: Any) -> Any:
        events = as_lists(corpus.reader_of(data).read(data, BadRows(skip=False)))
        corpora["train"] = reference_windows.reference_corpus(events, data)
        corpora["train"].train_counts = reference_windows.train_popularity(corpora["train"])
        return corpora["train"]

    def tokenise_split(encoder: Any, catalogue: Any, windows: Any, key: str) -> Any:
        samples = corpora["train"].splits[key.split()[1]]
        return reference_tokens.tokenise_split(encoder, catalogue, samples)

    recommendation.load_corpus = load_corpus
    recommendation.tokenise_split = tokenise_split


def work(arguments: list[str], old: bool) -> None:
    """Trains in this process and prints one line of JSON: seconds since the start, and peak memory."""
    from gdrt_ds.training import run, step

    started = time.perf_counter()
    if old:
        use_the_references()
    found: dict[str, Any] = {"step_s": [], "step_cpu_s": []}
    prepare, take_step = run.prepare, step.StepRunner.run

    def timed_prepare(config: Any) -> Any:
        prepared = prepare(config)
        found["data_s"] = time.perf_counter() - started
        found["data_cpu_s"] = time.process_time()
        found["data_mib"] = _peak_mib()
        found["samples"] = len(prepared.stores["train"])
        return prepared

    def timed_step(runner: Any, *given: Any) -> Any:
        before, cpu_before = time.perf_counter(), time.process_time()
        result = take_step(runner, *given)
        found.setdefault("first_step_s", time.perf_counter() - started)
        found.setdefault("first_step_cpu_s", time.process_time())
        found.setdefault("first_step_mib", max(found["data_mib"], _peak_mib()))
        found["step_s"].append(time.perf_counter() - before)
        found["step_cpu_s"].append(time.process_time() - cpu_before)
        return result

    run.prepare, step.StepRunner.run = timed_prepare, timed_step
    from gdrt_ds.train import main

    status = main(arguments)
    found["whole_s"] = time.perf_counter() - started
    found["peak_mib"] = max(found["first_step_mib"], _peak_mib())
    found["cpu_s"] = time.process_time()
    for name in ("step_s", "step_cpu_s"):
        found[name] = statistics.median(found[name][2:])
    if status:
        raise SystemExit(status)
    print("FOUND " + json.dumps(found), flush=True)


def _peak_mib() -> float:
    """The largest resident set since the run last reset it (gdrt_ds/training/memory_use.py does)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(log: Path, scratch: Path, old: bool = False) -> dict[str, Any] | None:
    """Runs one training in a process of its own; None if it did not end, and says why."""
    command = [
        sys.executable,
        __file__,
        "--work",
        *(["--old"] if old else []),
        *settings(log, scratch / "run"),
    ]
    environment = {**os.environ, "GDRT_CACHE": str(scratch / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        print(f"# it ended with {done.returncode}: {(done.stderr or done.stdout)[-600:]}", file=sys.stderr)
        return None
    return json.loads(line.removeprefix("FOUND "))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 5, 25])
    parser.add_argument(
        "--old-up-to", type=float, default=1, help="largest log for the old path, in millions"
    )
    parser.add_argument("--folder", help="where logs and caches are written; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--quick", action="store_true", help="20,000 interactions: within a minute")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--old", action="store_true", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.work:
        work(rest, options.old)
        return
    if options.quick:
        options.millions = [0.02]
    from benchmarks.machine_line import machine

    if not options.json:
        print(f"# {NUM_ITEMS:,} items, {STEPS} steps of 16 samples; {machine()}")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for millions in options.millions:
            rows = measure_size(Path(scratch) / f"{millions:g}", millions, options)
            for row in rows:
                print(json.dumps({**row, "machine": machine()}) if options.json else as_text(row), flush=True)


def measure_size(scratch: Path, millions: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one size: the old path as far as it goes, the first start and the second."""
    scratch.mkdir()
    log = scratch / "log"
    num = round(millions * 1e6)
    write_log(log, num, 600 if options.quick else NUM_ITEMS)
    kinds = [("first", False), ("again", False)]
    if millions <= options.old_up_to:
        kinds.insert(0, ("old", True))
    rows = []
    for name, old in kinds:
        found = measure(log, scratch / ("old" if old else "new"), old)
        if found is not None:
            row = {
                "name": f"{millions:g} M / {name}",
                "ours": found["first_step_cpu_s"],
                "shape": f"{num} events",
            }
            rows.append({**row, **found, "cpu_us_per_event": found["first_step_cpu_s"] / num * 1e6})
    peers = {row["name"].split(" / ")[1]: row for row in rows}
    for row in rows:
        if "old" in peers and "old" not in row["name"]:
            row["peer"] = peers["old"]["ours"]
            row["ratio"] = row["ours"] / row["peer"]
    return rows


def as_text(row: dict[str, Any]) -> str:
    def both(name: str) -> str:
        return f"{row[name + '_s']:6.1f} s ({row[name + '_cpu_s']:6.1f})"

    return (
        f"{row['name']:14s} clock (CPU): data {both('data')}, first step {both('first_step')}, "
        f"{row['cpu_us_per_event']:.1f} us of the CPU per event; all {row['whole_s']:6.1f} s "
        f"({row['cpu_s']:6.1f}); a step {row['step_s'] * 1e3:.0f} ms ({row['step_cpu_s'] * 1e3:.0f}); peak "
        f"{row['first_step_mib']:,.0f} MiB at the first step, {row['peak_mib']:,.0f} at the end"
    )


if __name__ == "__main__":
    main()
