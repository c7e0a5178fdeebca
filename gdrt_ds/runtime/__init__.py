"""What a process is in its job, and how it leaves it.

    ranks.py          which rank this process is, whichever launcher started it
    starting.py       joins the process group, claims a device and CPU threads
    devices.py        which accelerator and device there is; copies to it that nobody waits for
    cpu_products.py   whether this CPU multiplies bfloat16 faster than float32
    quick_imports.py  imports of libraries that compile while they are imported, without the compiler
    large_blocks.py   memory of freed tensors goes back to the system at once
    build_folder.py   where DeepSpeed's CPU extension is built, without waiting for other environments
    signals.py        signals that ask for a checkpoint
    watchdog.py       ends a rank that stopped moving, with the stacks of its threads
    failures.py       failures in words: a UserError or a broken machine becomes one message and a status

The exit statuses of a process are listed in gdrt_ds/errors.py.
"""

from gdrt_ds.errors import EXIT_INTERRUPTED
from gdrt_ds.runtime.build_folder import own_build_folder
from gdrt_ds.runtime.devices import device_of_rank, name_accelerator, to_device
from gdrt_ds.runtime.failures import explain, report_user_errors
from gdrt_ds.runtime.quick_imports import import_muon
from gdrt_ds.runtime.ranks import Runtime, detect_rank, free_port
from gdrt_ds.runtime.signals import catch_stop_signals, ignore_stop_signals
from gdrt_ds.runtime.starting import (
    prepare_libraries,
    quiet_libraries,
    single_process_runtime,
    start_runtime,
    unname_shared_memory,
)
from gdrt_ds.runtime.watchdog import Watchdog

__all__ = [
    "EXIT_INTERRUPTED",
    "Runtime",
    "Watchdog",
    "catch_stop_signals",
    "detect_rank",
    "device_of_rank",
    "explain",
    "free_port",
    "ignore_stop_signals",
    "name_accelerator",
    "own_build_folder",
    "import_muon",
    "prepare_libraries",
    "quiet_libraries",
    "report_user_errors",
    "single_process_runtime",
    "start_runtime",
    "to_device",
    "unname_shared_memory",
]
