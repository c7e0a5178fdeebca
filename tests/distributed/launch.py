"""Runs a command on forked ranks: one interpreter imports torch and DeepSpeed once, every rank is
`gdrt_ds.train.main`, or the command that it is given.

Nothing plays the launcher here: a rank that dies is not reported to its peers, so they must end by
themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.ranks import ROOT, free_port, status_of

SMOKE = str(ROOT / "configs" / "smoke.yaml")


@dataclass
class Outcome:
    """How a job ended. statuses.

    Per rank the exit status, -9 for a kill, None where it had to be ended by the harness.
    """

    statuses: list[int | None]
    outputs: list[str]
    seconds: float
    ended: list[float] = field(default_factory=list)  # seconds from the start, per rank

    @property
    def text(self) -> str:
        return "\n".join(self.outputs)


class Job:
    """A started job. `fault(rank)` runs in every rank before the command; `main` = None is the training."""

    def __init__(
        self,
        world: int,
        arguments: list[str],
        logs: Path,
        fault: Callable[[int], None] | None = None,
        main: Callable[[list[str]], Any] | None = None,
    ):
        self.world, self.started = world, time.monotonic()
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank_{rank}.log" for rank in range(world)]
        port = free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        self.main = main
        self.pids = [self._fork(rank, port, arguments, fault) for rank in range(world)]
        self.statuses: list[int | None] = [None] * world
        self.ended = [0.0] * world

    def _fork(self, rank: int, port: int, arguments: list[str], fault) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self.logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            if self.world > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(self.world),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            code = status_of(lambda: self._command(rank, arguments, fault))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _command(self, rank: int, arguments: list[str], fault) -> Any:
        from gdrt_ds import train

        if fault is not None:
            fault(rank)
        return (self.main or train.main)(arguments)

    def poll(self) -> bool:
        """True when every rank has ended."""
        for rank, pid in enumerate(self.pids):
            if pid and self.statuses[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
                    self.ended[rank] = time.monotonic() - self.started
        return all(status is not None for status in self.statuses)

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(self.world):
            if self.statuses[rank] is None:
                os.kill(self.pids[rank], number)

    def output(self, rank: int = 0) -> str:
        return (
            self.logs[rank].read_text(encoding="utf-8", errors="replace") if self.logs[rank].is_file() else ""
        )

    def until(self, text: str, timeout_s: float = 120.0, rank: int = 0) -> bool:
        """Waits until a rank has printed the text; False when it ended or the time is over."""
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            if text in self.output(rank):
                return True
            if self.poll():
                return text in self.output(rank)
            time.sleep(0.01)
        return False

    def wait(self, timeout_s: float = 240.0) -> Outcome:
        """Waits for the end of every rank; those left after `timeout_s` are killed and have status None."""
        limit = time.monotonic() + timeout_s
        while not self.poll() and time.monotonic() < limit:
            time.sleep(0.01)
        statuses = list(self.statuses)
        for rank, status in enumerate(statuses):
            if status is None:
                with open(self.logs[rank], "a", encoding="utf-8") as stream:
                    stream.write(
                        f"[killed after {timeout_s} s; its threads: {threads_of(self.pids[rank])}]\n"
                    )
                os.kill(self.pids[rank], signal.SIGKILL)
                os.waitpid(self.pids[rank], 0)
                self.statuses[rank] = -9
        return Outcome(
            statuses,
            [self.output(rank) for rank in range(self.world)],
            time.monotonic() - self.started,
            self.ended,
        )


def threads_of(pid: int) -> str:
    """name, state and kernel function of every thread of a process that should have ended."""
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            state = next(
                line.split(None, 1)[1].strip()
                for line in (task / "status").read_text().splitlines()
                if line.startswith("State:")
            )
            found.append(f"{(task / 'comm').read_text().strip()} {state} {(task / 'wchan').read_text()}")
    return "; ".join(found) or "none"


def play(
    world: int, arguments: list[str], logs: Path, fault=None, timeout_s: float = 240.0, main=None
) -> Outcome:
    return Job(world, arguments, logs, fault, main).wait(timeout_s)
