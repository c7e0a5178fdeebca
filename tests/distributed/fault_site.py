"""What the rows of the fault table share.

Settings of a tiny real run, straight runs to compare with, and the comparison to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launch import SMOKE, Job, Outcome, play

STEPS, SAVE_POINTS = 8, (1, 2, 3, 4, 5, 6)
# 28 samples in batches of 8: the first epoch ends inside step 4, the second at the end of step 7. Dropout is
# on: the random masks count too.
BASE = {
    "data.planted": "{num_train: 28, num_valid: 4, num_test: 4}",
    "train.global_batch": 8,
    "train.micro_batch": 2,
    "train.max_steps": STEPS,
    "train.warmup_steps": 2,
    "train.save_every": 1,
    "train.keep_checkpoints": 20,
    "train.eval_every": 3,
    "train.log_every": 1,
    "train.timeout_s": 60,
    "model.lora.dropout": 0.1,
    "model.lora.r": 4,
    "groups.num": 3,
}
UNTIMED = ("step_s", "tokens_per_s")


class Failed(AssertionError):
    """A row's claim does not hold."""


def need(condition, words: str) -> None:
    if not condition:
        raise Failed(words)


@dataclass
class Row:
    """One row: `check(site, quick)` returns what was seen, in words; raises Failed."""

    name: str
    claim: str
    check: Callable[[Site, bool], str]


class Site:
    """A folder of runs. Every run's own files are under folder/NAME, its output under folder/logs/NAME_i."""

    def __init__(self, folder: Path):
        self.folder, self._plays, self._straight = folder, 0, {}
        os.environ["GDRT_CACHE"] = str(
            folder / "cache"
        )  # relevance tables are shared between runs: here each fresh run scores again

    def arguments(self, run: Path, **changes) -> list[str]:
        settings = {
            **BASE,
            "run.dir": run,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return ["--config", SMOKE, *(f"{key}={value}" for key, value in settings.items())]

    def logs(self) -> Path:
        self._plays += 1
        return self.folder / "logs" / str(self._plays)

    def play(self, run: Path, world: int, fault=None, timeout_s: float = 300.0, **changes) -> Outcome:
        return play(world, self.arguments(run, **changes), self.logs(), fault, timeout_s)

    def start(self, run: Path, world: int, fault=None, **changes) -> Job:
        return Job(world, self.arguments(run, **changes), self.logs(), fault)

    def finish(self, run: Path, world: int, **changes) -> Outcome:
        """Goes on with resume=auto to the end."""
        done = self.play(run, world, resume="auto", **changes)
        need(done.statuses == [0] * world, f"resume=auto ended with {done.statuses}\n{done.text[-3000:]}")
        return done

    def straight(self, world: int, **changes) -> Path:
        """The folder of an undisturbed run, made once per setting."""
        key = (world, *sorted(changes.items()))
        if key not in self._straight:
            run = self.folder / f"straight_{len(self._straight)}"
            done = self.play(run, world, **changes)
            need(
                done.statuses == [0] * world,
                f"the undisturbed run ended with {done.statuses}\n{done.text[-3000:]}",
            )
            self._straight[key] = run
        return self._straight[key]

    def fresh(self, name: str) -> Path:
        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(self.folder / "cache" / "relevance", ignore_errors=True)
        return run

    def copy_until(self, source: Path, name: str, step: int) -> Path:
        """A copy of a run in a fresh folder, as if it had been killed after publishing `step`."""
        return copy_until(source, self.fresh(name), step)


def copy_until(source: Path, run: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after publishing `step`.

    Its metrics go further than the checkpoint.
    """
    shutil.copytree(source, run)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.split("_")[1]) > step:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(f"step_{step}")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    return run


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]


def differences(run: Path, straight: Path) -> list[str]:
    """What is not the same to the bit.

    Every figure of every step, the adapter, the last checkpoint's weights, moments, generators and DRO state.
    """
    found, wanted = metrics(run), metrics(straight)
    problems = (
        []
        if [m["step"] for m in found] == [m["step"] for m in wanted]
        else [f"steps in metrics.jsonl: {[m['step'] for m in found]}"]
    )
    problems += [
        f"step {a['step']}: {key} {a[key]} instead of {b[key]}"
        for a, b in zip(found, wanted)
        for key in b
        if a.get(key) != b[key]
    ]
    last = max((straight / "checkpoints").glob("step_*"), key=lambda p: int(p.name.split("_")[1])).name
    files = [
        "adapter/adapter_model.safetensors",
        "groups.json",
        "validation.jsonl",
        *(
            f"checkpoints/{last}/{p.name}"
            for p in (straight / "checkpoints" / last).iterdir()
            if p.name.startswith("rank_") or p.name in ("state.json", "client.safetensors")
        ),
    ]
    return problems + [
        name
        for name in files
        if not (run / name).is_file() or (run / name).read_bytes() != (straight / name).read_bytes()
    ]


def need_same(run: Path, straight: Path, words: str) -> None:
    wrong = differences(run, straight)
    need(not wrong, f"{words}: {len(wrong)} differences, e.g. {wrong[:3]}")


def newest(run: Path) -> int:
    """Step of the newest valid checkpoint, 0 if there is none."""
    from gdrt_ds.training import checkpoint

    path = checkpoint.find_latest_valid(run)
    return int(path.name.split("_")[1]) if path is not None else 0


def summary(run: Path) -> str | None:
    path = run / "summary.json"
    return json.loads(path.read_text())["status"] if path.is_file() else None


def wait_for(condition: Callable[[], bool], seconds: float, words: str) -> float:
    started = time.monotonic()
    while not condition():
        need(time.monotonic() - started < seconds, f"{words} within {seconds:.0f} s")
        time.sleep(0.02)
    return time.monotonic() - started
