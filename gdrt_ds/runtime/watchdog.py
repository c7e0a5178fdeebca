"""Ends a rank that stopped moving, and leaves the stacks of its threads behind."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from gdrt_ds.errors import LostPeer
from gdrt_ds.runtime.ranks import Runtime


class Watchdog:
    """Ends this rank with status 70 when no `beat` came for `timeout_s` seconds.

    The stacks of all its threads go to `folder/stacks_rank_K.txt`. Collectives have the same time-out; the
    watchdog covers what hangs elsewhere (a stopped peer, a dead file system). It watches between `__enter__`
    and `__exit__`.
    """

    def __init__(self, runtime: Runtime, folder: Path, timeout_s: int):
        self.runtime = runtime
        self.path = Path(folder) / f"stacks_rank_{runtime.rank}.txt"
        self.timeout_s = timeout_s
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()

    def beat(self) -> None:
        """Says that this rank moves."""
        self._last = time.monotonic()

    def dump(self, reason: str, error: BaseException | None = None) -> None:
        """Writes where the error was raised, and what every thread does now."""
        with open(self.path, "w", encoding="utf-8") as stream:
            stream.write(f"rank {self.runtime.rank} of {self.runtime.world}: {reason}\n")
            if error is not None:
                stream.write("".join(traceback.format_exception(error)))
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout_s / 4)):
            silent = time.monotonic() - self._last
            if silent > self.timeout_s:
                self._end(silent)

    def _end(self, silent: float) -> None:
        likely = "a peer is dead or hung"
        if self.runtime.world == 1:
            likely = "this process hangs, or its machine or file system is too busy"
        reason = f"no step finished for {silent:.0f} s (train.timeout_s={self.timeout_s}): {likely}"
        # A full or dead file system must not keep this rank from ending.
        with contextlib.suppress(OSError):
            self.dump(reason)
        print(
            f"error: rank {self.runtime.rank}: {reason}; stacks: {self.path}\n"
            "  fix: resume=auto goes on from the newest valid checkpoint; where steps do take that long, "
            "raise train.timeout_s",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LostPeer.status)
