"""Evaluates many runs in one process, so that imports are paid once."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT


def evaluate_runs(runs: Sequence[str], arguments: Sequence[str]) -> int:
    """Runs `eval.run` on one run folder after the other; one that fails does not end the others. Ctrl-C does.

    The output of each goes to RUN/logs/evaluation.log, its evaluation to RUN/eval/test-renormalised.

    Args:
        arguments: further arguments of `eval.run`, the same for all.
    Returns:
        how many failed.
    """
    failures = 0
    for run in map(Path, runs):
        log = run / "logs" / "evaluation.log"
        status = _evaluate(run, arguments, log)
        if status:
            failures += 1
            print(f"{run.name}: evaluation failed with status {status} (log: {log})", flush=True)
            if status == INTERRUPTED:
                raise SystemExit(INTERRUPTED)
        else:
            print(f"{run.name}: evaluated", flush=True)
    return failures


def _evaluate(run: Path, arguments: Sequence[str], log: Path) -> object:
    """The exit status of one evaluation; 0 or None for success."""
    from eval.run import main as evaluate  # late: it imports torch, which a study's page does not need

    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["--run", str(run), "--output", str(run / "eval" / "test-renormalised"), *arguments]
    with (
        open(log, "w", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            evaluate(words)
        except SystemExit as end:
            return end.code
        except Exception:  # a bug, which must not end the evaluations of the other runs
            traceback.print_exc()
            return 1
    return 0
