"""What a person sees while samples are scored."""

from __future__ import annotations

import time

from gdrt_ds.runtime import Runtime

SECONDS_BETWEEN_LINES = 15


class Progress:
    """A live bar on a terminal, plain lines every 15 s in a log. Rank 0 speaks, for its own share.

    Args:
        what: the title of the bar or line.
        unit: what is counted.
    """

    def __init__(self, runtime: Runtime, what: str, unit: str = "samples"):
        self.runtime = runtime
        self.what = what
        self.unit = unit
        self.started = time.time()
        self.last_line = 0.0
        self.bar = None
        self.task = None

    def __enter__(self) -> Progress:
        from rich.console import Console

        if self.runtime.is_main and Console().is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=None)
        return self

    def __call__(self, finished: int, total: int) -> None:
        """Says how many of this rank's samples are scored."""
        if self.bar is not None:
            self.bar.update(self.task, completed=finished, total=total)
            return
        now = time.time()
        due = finished == total or now - self.last_line > SECONDS_BETWEEN_LINES
        if not self.runtime.is_main or not due:
            return
        self.last_line = now
        spent = now - self.started
        left = spent / finished * (total - finished)
        ranks = f" on this rank of {self.runtime.world}" if self.runtime.world > 1 else ""
        speed = f"{finished / spent:.2f} {self.unit}/s"
        print(f"{self.what}: {finished}/{total} {self.unit}{ranks}, {speed}, {left:.0f} s left", flush=True)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()
