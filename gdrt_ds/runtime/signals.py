"""Signals of a training process: which ones ask for a checkpoint, and when they are not heard any more."""

from __future__ import annotations

import faulthandler
import signal

from gdrt_ds.runtime.ranks import Runtime

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def catch_stop_signals(runtime: Runtime) -> None:
    """From now on SIGTERM, SIGUSR1 and the first Ctrl-C ask for a checkpoint.

    It is written after the step, or after the micro-batch of the validation, that is being computed.

    The second Ctrl-C ends at once. SIGUSR2 prints the stacks of all threads and goes on.
    """

    def handler(number, frame):
        if number == signal.SIGINT and runtime.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        runtime.stop_signal = number

    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)


def ignore_stop_signals() -> None:
    """Called when a rank has done its work.

    At exit Python puts the default actions back, and a late signal would turn success into a death.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
