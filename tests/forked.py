"""Runs a command or a scenario in a fork of the test's process: libraries are imported once for many.

A command of its own imports for eight seconds of one core, and most that tests start work for two. What is
tested about the start itself (arguments of the interpreter, launchers, imports, signals) needs a process of
its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed.launch import SMOKE
from tests.distributed.ranks import ROOT, preload, status_of

POLL_S = 0.02


def run_forked(
    main: Callable[[list[str]], Any], words: list[str], logs: Path, timeout_s: float = 600.0
) -> subprocess.CompletedProcess:
    """What `subprocess.run` of the command would give, in the root of the project.

    Args:
        main: the command's function; it returns the exit status, or None, or raises SystemExit.
        words: its arguments.
        logs: a folder for what it prints.

    Raises:
        subprocess.TimeoutExpired: the command was killed.
    """
    preload()
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / "stdout", logs / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(main, words, out, err)
    limit = time.monotonic() + timeout_s
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < limit:
        time.sleep(POLL_S)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise subprocess.TimeoutExpired(words, timeout_s, out.read_text(), err.read_text())
    return subprocess.CompletedProcess(
        words,
        os.waitstatus_to_exitcode(status),
        out.read_text(encoding="utf-8", errors="replace"),
        err.read_text(encoding="utf-8", errors="replace"),
    )


def train_forked(run: Path, *settings: str, config: str | None = SMOKE) -> subprocess.CompletedProcess:
    """One rank of the training command.

    Args:
        run: the run folder. Its log lies in a folder beside it.
        settings: further words of the command.
        config: None = the defaults.
    """
    from gdrt_ds import train

    command = [*(["--config", config] if config else []), f"run.dir={run}", *settings]
    return run_forked(train.main, command, run.parent / f"{run.name}_logs")


def run_scenario(name: str, folder: Path, *part: str, timeout_s: float = 550.0) -> dict[str, Any]:
    """Runs `main` of tests/distributed/NAME.py; returns the JSON that it wrote.

    The same by hand: `python -m tests.distributed.NAME OUTPUT.json FOLDER`.

    Args:
        part: which part of the scenario, for one that can be asked for parts.
    """
    output = folder / ("_".join([name, *part]) + ".json")
    logs = output.with_suffix("")

    def main(words: list[str]) -> None:
        importlib.import_module(f"tests.distributed.{name}").main(*words)

    done = run_forked(main, [str(output), str(folder), *part], logs, timeout_s)
    if done.returncode != 0 or not output.is_file():
        raise AssertionError(
            f"{name} failed ({done.returncode})\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        )
    return json.loads(output.read_text(encoding="utf-8"))


def _child(main: Callable[[list[str]], Any], words: list[str], out: Path, err: Path) -> None:
    """The command, in the fork; it ends the process."""
    status = 1
    try:
        for number, log in ((1, out), (2, err)):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        os.chdir(ROOT)
        torch.set_num_threads(1)  # threads of the pool before the fork are not there
        status = status_of(lambda: main(words))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
