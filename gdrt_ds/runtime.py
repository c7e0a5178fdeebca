"""Ranks, launchers, signals and time-outs: what a process is in its job, and how it leaves it.

`start_runtime` understands `deepspeed`, `torchrun`, `srun` and plain `python`; `report_user_errors` turns
a UserError into one clear message and exit status 2; `Watchdog` ends a job whose ranks stopped moving,
with the stacks of every rank.
Exit statuses: 0 finished, 1 a bug, 2 the user's mistake (NaN and out of memory too: a setting has to
change), 70 hung or dead peer, 74 no space for what has to be written, 75 interrupted after a checkpoint
(please requeue).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import hashlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from gdrt_ds.errors import LostPeer, StorageError, UserError

EXIT_HUNG, EXIT_INTERRUPTED = LostPeer.status, 75
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "socket closed",
    "recvvalue failed",
    "remote process exited",
    "connection refused",
    "application timeout",
)


@dataclass
class Runtime:
    """One process of the job. `life` is the restart count of the job (fencing).

    `threads` are this rank's CPU threads.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launcher: str = "python"
    life: int = 0
    threads: int = 1
    stop_signal: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def detect_rank() -> dict:
    """Rank variables of whichever launcher started this process, without starting anything."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher = (
            "torchrun" if "TORCHELASTIC_RUN_ID" in env else "srun" if "SLURM_STEP_ID" in env else "deepspeed"
        )
        world = int(env["WORLD_SIZE"])
        return dict(
            rank=int(env["RANK"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            world=world,
            launcher=launcher,
            local_world=int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world),
        )
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in env:
        world = int(env["SLURM_NTASKS"])
        nodes = int(env.get("SLURM_NNODES", 1))
        return dict(
            rank=int(env["SLURM_PROCID"]),
            local_rank=int(env.get("SLURM_LOCALID", 0)),
            world=world,
            local_world=-(-world // nodes),
            launcher="srun",
        )
    return dict(rank=0, local_rank=0, world=1, local_world=1, launcher="python")


def _claim_cpu_threads(local_world: int) -> int:
    """Cores divided by local ranks unless OMP_NUM_THREADS says otherwise: every rank would take all cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, local_world))


def quiet_libraries() -> None:
    """Keeps the log readable.

    Libraries' warnings about each other's deprecated calls, and their progress bars, say nothing to a user.
    """
    for library in ("torch.distributed", "deepspeed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it advises a kernel for inference that training does not use
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def single_process_runtime() -> Runtime:
    """The runtime of a command that no launcher started.

    This process, the first GPU or the CPU, no process group.
    """
    quiet_libraries()
    return Runtime(device=torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def start_runtime(timeout_s: int = 600) -> Runtime:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) and catches the signals that ask for a checkpoint.

    Raises:
        UserError: rendezvous failed, with the addresses tried.
    """
    quiet_libraries()
    found = detect_rank()
    found["threads"] = _claim_cpu_threads(found["local_world"])
    torch.set_num_threads(found["threads"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", found["local_rank"] % torch.cuda.device_count())
        torch.cuda.set_device(device)
    runtime = Runtime(
        device=device,
        life=int(os.environ.get("GDRT_LIFE", os.environ.get("SLURM_RESTART_COUNT", 0)) or 0),
        **found,
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port()) if runtime.world == 1 else "29500"
    os.environ.update(
        RANK=str(runtime.rank), WORLD_SIZE=str(runtime.world), LOCAL_RANK=str(runtime.local_rank)
    )
    own_build_folder()
    import deepspeed

    try:
        deepspeed.init_distributed(
            "nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
        if device.type == "cpu":
            unname_shared_memory(runtime.rank, runtime.world)
    except (RuntimeError, dist.DistError) as error:
        raise UserError(
            f"rank {runtime.rank} of {runtime.world} could not join the process group at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}",
            "check MASTER_ADDR and MASTER_PORT; two jobs on one machine need a port each (`deepspeed "
            "--master_port N`, "
            "`torchrun --master_port N`); on several interfaces set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME",
        ) from None
    catch_stop_signals(runtime)
    return runtime


def unname_shared_memory(rank: int, world: int) -> None:
    """DeepSpeed's CPU ranks share 66 MiB each by names in /dev/shm that nobody removes: a few hundred runs
    would fill the memory.

    When every rank has joined, every rank has mapped them all: the names can go, and the memory ends with
    the processes, however they end.
    Every rank calls it.
    """
    if world > 1:
        dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    with contextlib.suppress(OSError):  # ranks on several nodes have none
        (Path("/dev/shm") / name).unlink()


STALE_LOCK_S = 900


def own_build_folder() -> None:
    """DeepSpeed's small CPU extension is built once per environment, not once for all.

    torch keeps one folder per user: two environments then rebuild it in turns, and all ranks of both wait
    for each other's compiler. A build
    that was killed leaves its lock behind, for which every later start would wait forever: an old lock is
    removed.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        key = hashlib.sha256(
            f"{sys.prefix} {torch.__version__} {metadata.version('deepspeed')}".encode()
        ).hexdigest()[:12]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache / "torch_extensions" / f"gdrt_ds_{key}")
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
                lock.unlink()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def catch_stop_signals(runtime: Runtime) -> None:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a checkpoint at the next step boundary.

    The second Ctrl-C ends at once.
    """

    def handler(number, frame):
        if number == signal.SIGINT and runtime.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        runtime.stop_signal = number

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, handler)
    faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)


def ignore_stop_signals() -> None:
    """When a rank has done its work.

    At exit Python puts the default actions back, and a late signal would turn success into a death.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Watchdog:
    """Ends this rank when no `beat` came for `timeout_s`: stacks of all its threads go to
    `folder/stacks_rank_K.txt`.

    Collectives have the same time-out; the watchdog covers what hangs elsewhere (a stopped peer, a dead
    file system).
    """

    def __init__(self, runtime: Runtime, folder: Path, timeout_s: int):
        self.runtime, self.path, self.timeout_s = (
            runtime,
            Path(folder) / f"stacks_rank_{runtime.rank}.txt",
            timeout_s,
        )
        self._last, self._done = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._done.set()

    def beat(self) -> None:
        self._last = time.monotonic()

    def dump(self, reason: str, error: BaseException | None = None) -> None:
        """Where the error was raised, and what every thread does now."""
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
                reason = (
                    f"no step finished for {silent:.0f} s (train.timeout_s={self.timeout_s}): a peer is "
                    "dead or hung"
                )
                with contextlib.suppress(OSError):
                    self.dump(reason)
                print(
                    f"error: rank {self.runtime.rank}: {reason}; stacks: {self.path}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_HUNG)


def explain(
    error: BaseException, memory_fix: str = "a smaller batch, shorter prompts or more ranks need less"
) -> UserError | None:
    """The failures of a machine in words: out of memory, a dead or hung peer, a full disk. None for
    anything else.

    Args:
        memory_fix: what a user of this command can change when memory runs out.
    """
    if isinstance(error, UserError):
        return error
    text = str(error).strip()
    first = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
    if (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or isinstance(error, RuntimeError)
        and any(w in text for w in OUT_OF_MEMORY)
    ):
        return UserError(
            f"out of memory on {'the GPU' if isinstance(error, torch.OutOfMemoryError) else 'the host'} "
            f"({first})",
            memory_fix,
        )
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EIO,
    ):
        return StorageError(
            f"{error.filename or 'a file'} cannot be written ({error.strerror})",
            "free disk space and go on with resume=auto; published checkpoints are intact",
        )
    if (
        isinstance(error, (dist.DistError, RuntimeError))
        and dist.is_initialized()
        and any(w in text.lower() for w in LOST_PEER)
    ):
        return LostPeer(
            f"a peer is dead or hung: {first}",
            "the first rank that failed says why in its own output; resume=auto goes on from the newest "
            "valid checkpoint; train.timeout_s sets how long ranks wait for each other",
        )
    return None


@contextlib.contextmanager
def report_user_errors(**fixes: str):
    """Around a command's main: a UserError, or a failure that `explain(error, **fixes)` has words for,
    becomes `error: ...` and its exit status, on every rank, without a traceback. Anything else is a bug: a
    traceback and status 1, at once, so that no peer waits for this rank.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted: nothing was published after the last checkpoint", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    except Exception as error:
        told = explain(error, **fixes)
        if told is None and not dist.is_initialized():
            raise
        if told is None:
            traceback.print_exc()
        else:
            rank = detect_rank()["rank"]
            same_everywhere = isinstance(error, UserError) and rank != 0
            print(
                f"error on rank {rank}: {told.problem}"
                if same_everywhere
                else f"error: rank {rank}: {told}"
                if told is not error
                else f"error: {told}",
                file=sys.stderr,
                flush=True,
            )
        code = 1 if told is None else told.status
    else:
        return
    sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # a peer may wait in a collective: interpreter shutdown would wait with it
    sys.exit(code)
