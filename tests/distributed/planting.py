"""Faults planted in a rank before the training command runs there: deaths at file operations, NaN, full
disks, pauses to be signalled in.

Everything is planted from outside by replacing functions of this process; the product has no hook for any
of it. Each function here returns a `fault(rank)` for launch.Job.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import resource
import signal
import time
from pathlib import Path

KINDS = {
    "save_file": "write",
    "write_text": "write",
    "save": "write",
    "fsync": "fsync",
    "replace": "rename",
    "rmtree": "remove",
}


def _wrap(owner, name: str, make) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _path(name: str, args) -> Path | None:
    position = {"save_file": 1, "write_text": 0, "replace": 1, "rmtree": 0, "save": 2}.get(name)
    return Path(args[position]) if position is not None and position < len(args) else None


def file_operations(log: Path, victim: int, die_at: int | None = None, when: str = "before"):
    """Numbers the file operations of a rank's saves and kills the victim (SIGKILL, itself) at one of them.

    when: before, after, or torn (the write is cut in half). Every operation goes to `log`_rank as a line
    `index kind function file`.
    """

    def fault(rank: int) -> None:
        import shutil

        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        from gdrt_ds.training import checkpoint, durable

        armed, counter = [False], [0]

        def arm(save):
            def armed_save(*args, **kwargs):
                armed[0] = True
                try:
                    return save(*args, **kwargs)
                finally:
                    armed[0] = False
                    with open(f"{log}_{rank}", "a") as stream:
                        stream.write("end of a save\n")

            return armed_save

        def watch(name):
            def make(original):
                def operation(*args, **kwargs):
                    if not armed[0]:
                        return original(*args, **kwargs)
                    index, path = counter[0], _path(name, args)
                    counter[0] += 1
                    with open(f"{log}_{rank}", "a") as stream:
                        stream.write(f"{index} {KINDS[name]} {name} {path.name if path else ''}\n")
                    mine = rank == victim and index == die_at
                    if mine and when == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = original(*args, **kwargs)
                    if mine and when == "torn":
                        os.truncate(path, path.stat().st_size // 2)
                    if mine:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                return operation

            return make

        _wrap(checkpoint, "save", arm)
        for owner, name in (
            (durable, "save_file"),
            (durable, "write_text"),
            (os, "fsync"),
            (os, "replace"),
            (shutil, "rmtree"),
            (TorchCheckpointEngine, "save"),
        ):
            _wrap(owner, name, watch(name))

    return fault


def nan_loss(victim: int, step: int):
    """The losses of one rank are NaN in one step (0-based); every optimizer step of every rank is printed."""

    def fault(rank: int) -> None:
        import deepspeed

        from gdrt_ds.training.step import StepRunner

        def poison(forward):
            def poisoned(self, samples, at, index):
                found = forward(self, samples, at, index)
                if rank == victim and at == step:
                    nan = float("nan")
                    return dataclasses.replace(found, sums=found.sums * nan, values=found.values * nan)
                return found

            return poisoned

        def told(engine_step):
            def stepping(self, *args, **kwargs):
                print("an optimizer step", flush=True)
                return engine_step(self, *args, **kwargs)

            return stepping

        _wrap(StepRunner, "_forward", poison)
        _wrap(deepspeed.DeepSpeedEngine, "step", told)

    return fault


def nan_gradient(victim: int, step: int):
    """The losses of a step are finite, the gradients of one rank are not."""

    def fault(rank: int) -> None:
        from gdrt_ds.training.step import StepRunner

        def remember(run):
            def running(self, at, lr):
                self.planted_step = at
                return run(self, at, lr)

            return running

        def poison(backward):
            def poisoned(self, sums, values, coefficients, token_coefficients):
                bad = rank == victim and self.planted_step == step
                return backward(
                    self,
                    sums,
                    values,
                    coefficients * float("nan") if bad else coefficients,
                    token_coefficients,
                )

            return poisoned

        _wrap(StepRunner, "run", remember)
        _wrap(StepRunner, "_backward", poison)

    return fault


def broken_weights(step: int):
    """Optimizer step `step` (1-based) leaves NaN in an adapter matrix, as an absurd learning rate would."""

    def fault(rank: int) -> None:
        import deepspeed
        import torch
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        taken = [0]

        def breaking(engine_step):
            def stepping(self, *args, **kwargs):
                taken[0] += 1
                if taken[0] == step:
                    parameter = next(p for n, p in self.module.named_parameters() if "lora_B" in n)
                    whole = safe_get_full_fp32_param(parameter)
                    safe_set_full_fp32_param(parameter, torch.full_like(whole, float("nan")))
                return engine_step(self, *args, **kwargs)

            return stepping

        _wrap(deepspeed.DeepSpeedEngine, "step", breaking)

    return fault


def left_out_step(step: int):
    """The step is never run: what a skipped step must be equal to."""

    def fault(rank: int) -> None:
        from gdrt_ds.training.step import StepResult, StepRunner

        def leave_out(run):
            def running(self, at, lr):
                if at != step:
                    return run(self, at, lr)
                import torch

                nothing = torch.full((self.tokens.num_groups,), float("nan"), dtype=torch.float64)
                no_tokens = torch.zeros((), dtype=torch.float64)
                return StepResult(
                    nothing.sum(), nothing.sum(), nothing, nothing, nothing, 0, no_tokens, False, True
                )

            return running

        _wrap(StepRunner, "run", leave_out)

    return fault


def no_memory(victim: int, step: int):
    """One rank asks the real allocator for more than the machine has."""

    def fault(rank: int) -> None:
        import torch

        from gdrt_ds.training.step import StepRunner

        def greedy(forward):
            def forwarding(self, samples, at, index):
                if rank == victim and at == step:
                    torch.empty(2**50, dtype=torch.uint8)
                return forward(self, samples, at, index)

            return forwarding

        _wrap(StepRunner, "_forward", greedy)

    return fault


def small_files(victim: int, step: int, limit: int = 3000):
    """From the save of `step` on, this rank cannot write a file beyond `limit` bytes (EFBIG, as a quota
    would).
    """

    def fault(rank: int) -> None:
        from gdrt_ds.training import checkpoint

        def limited(save):
            def saving(engine, run_dir, at, *args, **kwargs):
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                if rank == victim and at >= step:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
                try:
                    return save(engine, run_dir, at, *args, **kwargs)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

            return saving

        _wrap(checkpoint, "save", limited)

    return fault


def pause(phase: str, seconds: float = 1.0, step: int = 2):
    """Prints `PHASE <phase>` and waits there, so that a signal can be sent in the middle of it. step.

    0-based, for training and saving.
    """

    def fault(rank: int) -> None:
        from gdrt_ds.dro import relevance
        from gdrt_ds.training import checkpoint, run
        from gdrt_ds.training.step import StepRunner

        where = {
            "data loading": (run, "prepare"),
            "relevance scoring": (relevance, "score_entries"),
            "training": (StepRunner, "run"),
            "saving": (checkpoint, "_write_own"),
        }[phase]

        def slow(original):
            def waiting(*args, **kwargs):
                now = {"training": lambda: args[1] == step, "saving": lambda: args[3] == step + 1}.get(
                    phase, lambda: True
                )
                if now():
                    print(f"PHASE {phase}", flush=True)
                    limit = time.monotonic() + seconds
                    while time.monotonic() < limit:  # Python-level signal handlers run between the naps
                        time.sleep(0.05)
                return original(*args, **kwargs)

            return waiting

        _wrap(*where, slow)

    return fault
