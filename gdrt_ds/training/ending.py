"""The end of a run: the adapter of the best step, and summary.json."""

from __future__ import annotations

import time
from pathlib import Path

from gdrt_ds.runtime import EXIT_INTERRUPTED
from gdrt_ds.training import checkpoint, run_folder
from gdrt_ds.training.adapter import save_adapter
from gdrt_ds.training.broken_numbers import NonFiniteLoss
from gdrt_ds.training.job import Job, on_main_rank
from gdrt_ds.training.loading import Loaded
from gdrt_ds.training.loop import Result
from gdrt_ds.training.memory_use import cpu_allocator, format_bytes
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.telemetry import duration


def end(job: Job, prepared: Prepared, loaded: Loaded, result: Result) -> int:
    """Publishes what the run leaves behind; returns the exit status. Every rank calls it."""
    if result.interrupted:
        return _interrupted(job, loaded, result)
    broken = result.last is not None and not result.last.is_finite
    if broken:
        _refuse_without_a_sound_checkpoint(job, result)
    adapter_step = _publish_adapter(job, prepared, loaded, result)
    peak = loaded.memory.largest()
    kept = ""
    if job.runtime.device.type == "cpu" and cpu_allocator() == "glibc":
        kept = ", and glibc keeps freed memory beside them"
    job.say(f"memory per rank: peak {format_bytes(peak)}; --plan predicts its tensors{kept}")
    seconds = time.time() - job.started
    if job.runtime.is_main:
        run_folder.write_summary(
            job.folder,
            "completed",
            step=result.step,
            total_steps=loaded.total_steps,
            adapter_step=adapter_step,
            stopped_early=result.stopped_early,
            best=result.best.figures,
            last_validation_finite=not broken,
            seconds=round(seconds, 1),
            tokens_per_rank=result.tokens,
            samples=result.step * job.config.train.global_batch,
            objective=job.config.objective,
            world=job.runtime.world,
            launcher=job.runtime.launcher,
            device=job.runtime.device.type,
            dtype=str(loaded.dtype).removeprefix("torch."),
            packing=loaded.packing,
            loading=loaded.base.loading,
            life=job.life,
            base_fingerprint=loaded.base.fingerprint,
            data_fingerprint=prepared.data.fingerprint,
            peak_memory_bytes=peak,
        )
    if broken:
        job.say(
            f"warning: the last validation (step {result.last.step}) is not finite, so the run broke down "
            f"after step {adapter_step}; the adapter is of that step. Lower train.lr"
        )
    job.say(f"done: {job.folder} ({duration(seconds)}); next: python -m eval.run --run {job.folder}")
    job.runtime.barrier()
    return 0


def _refuse_without_a_sound_checkpoint(job: Job, result: Result) -> None:
    """The last weights are broken: only an earlier checkpoint can give the adapter.

    Raises:
        NonFiniteLoss: no validation was finite, or the checkpoint of the best one is not there.
    """
    best = result.best.figures
    if best is not None and _problem_of(job, _checkpoint_of(job, best["step"])) is None:
        return
    seen = "no validation was finite"
    if best is not None:
        seen = f"the best validation was at step {best['step']}, of which there is no sound checkpoint"
    raise NonFiniteLoss(
        f"the last validation (step {result.last.step}) is not finite, and {seen}: no adapter is published",
        "lower train.lr and start anew; train.on_nonfinite=stop ends such a run at once, and with a lower "
        "train.eval_every the first validation, whose checkpoint is kept, comes earlier",
    )


def _checkpoint_of(job: Job, step: int) -> Path:
    return job.folder / "checkpoints" / f"step_{step}"


def _problem_of(job: Job, folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; what rank 0 reads counts for all."""
    return on_main_rank(job.runtime, lambda: checkpoint.verify(folder))


def _interrupted(job: Job, loaded: Loaded, result: Result) -> int:
    if job.runtime.is_main:
        run_folder.write_summary(
            job.folder, "interrupted", step=result.step, total_steps=loaded.total_steps, life=job.life
        )
    cause = "a request of another rank"
    if job.runtime.stop_signal is not None:
        cause = "a signal"
    elif job.runtime.time_is_up:
        cause = "run.max_minutes"
    job.say(f"interrupted by {cause}: all ranks saved step {result.step}; go on with resume=auto")
    job.runtime.barrier()
    return EXIT_INTERRUPTED


def _publish_adapter(job: Job, prepared: Prepared, loaded: Loaded, result: Result) -> int:
    """Writes RUN/adapter from the best checkpoint that is still there, else from the last step.

    Returns that step.
    """
    step = result.step
    best = result.best.figures
    if best is not None and best["step"] != step:
        folder = _checkpoint_of(job, best["step"])
        problem = _problem_of(job, folder)
        if problem is None:
            checkpoint.load(loaded.engine, folder, restore_rng=False)
            step = best["step"]
            job.say(f"adapter: from step {step}, the best by validation {job.config.train.select_by}")
        else:
            job.say(
                f"warning: the checkpoint of the best validation, {folder}, cannot be read ({problem}); the "
                f"adapter is of the last step, {step}"
            )
    save_adapter(loaded.engine, job.folder / "adapter", tokenizer=prepared.tokenizer)
    return step
