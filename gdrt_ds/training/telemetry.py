"""What a run says while it works: a live bar on a terminal, plain lines in a log, one JSON line per step,
TensorBoard and W&B.

Metrics stay on the device until they are written, every `train.log_every` steps. Then all of them are read
in one piece, so that logging costs one synchronisation in as many steps.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from pathlib import Path

import torch

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.files import finite, write_text
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.weight_watch import WeightWatch

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the GPU's name (NVIDIA data sheets)."""


def say(runtime: Runtime, text: str) -> None:
    """One line from rank 0."""
    if runtime.is_main:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Returns e.g. 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _keep_steps_before(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run computes again, so that every step has one line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # the last line of a killed run may be torn
    write_text(path, "".join(line + "\n" for line in kept))


def read_at_once(records: list[dict]) -> list[dict]:
    """Returns records with numbers in place of tensors, which are copied from the device in one piece.

    A tensor without dimensions becomes a number, any other a flat list. All of them pass through float64,
    which holds every float32 and every count exactly.
    """
    tensors = [value for record in records for value in record.values() if isinstance(value, torch.Tensor)]
    if not tensors:
        return records
    device = tensors[0].device
    packed = torch.cat([tensor.detach().to(device, torch.float64).reshape(-1) for tensor in tensors])
    numbers = iter(packed.tolist())

    def read(value):
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 0:
            return next(numbers)
        return [next(numbers) for _ in range(value.numel())]

    return [{name: read(value) for name, value in record.items()} for record in records]


class Telemetry:
    """Rank 0 writes; the other ranks hold an object that does nothing."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        runtime: Runtime,
        total_steps: int,
        first_step: int,
        model_flops_per_token: float = 0.0,
    ):
        self.runtime = runtime
        self.config = config
        self.total = total_steps
        self.first = first_step
        self.path = folder / "metrics.jsonl"
        self.pending: list[dict] = []
        self.started = self.interval = time.perf_counter()
        self.flops_per_token = model_flops_per_token
        self.bar = self.board = self.wandb = None
        self.watch = WeightWatch(config, total_steps)
        if not runtime.is_main:
            return
        for path in (self.path, folder / "validation.jsonl"):
            _keep_steps_before(path, first_step)
        # Held open: the next life replaces the file, so an orphan of this life would write into one that
        # nobody reads.
        self.stream = open(self.path, "a", encoding="utf-8", buffering=1)
        self.validations = open(folder / "validation.jsonl", "a", encoding="utf-8", buffering=1)
        if config.log.tensorboard:
            self.board = _tensorboard(folder, first_step)
        if config.log.wandb:
            self.wandb = _wandb(config, folder)
        if sys.stdout.isatty():
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self.bar.start()
        self.task = self.bar.add_task(
            self.config.objective, total=self.total, completed=self.first, figures=""
        )

    def step(self, record: dict) -> None:
        """Queues one step's record (values may be device tensors); writes when the interval is full."""
        self.pending.append(record)
        if len(self.pending) >= self.config.train.log_every or record["step"] >= self.total:
            self.flush()

    def flush(self) -> None:
        """Writes what is queued."""
        if not self.pending:
            return
        records = self.pending
        self.pending = []
        if not self.runtime.is_main:
            return
        # Absent groups and skipped steps, which are NaN, become null.
        records = [finite(record) for record in read_at_once(records)]
        now = time.perf_counter()
        seconds = (now - self.interval) / len(records)
        self.interval = now
        for record in records:
            record["tokens"] = int(record["tokens"])  # float64, as all that is read from the device at once
            record["step_s"] = round(seconds, 6)
            record["tokens_per_s"] = round(record["tokens"] / max(seconds, 1e-9), 1)
            self._mirror(record)
        self.stream.write("".join(json.dumps(record) + "\n" for record in records))
        self.stream.flush()
        self._show(records[-1], seconds)
        for text in filter(None, map(self.watch.add, records)):
            self.note(text)

    def _mirror(self, record: dict) -> None:
        scalars = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for name in ("group_loss", "group_weight"):
            scalars |= {f"{name}/{g}": v for g, v in enumerate(record.get(name) or []) if v is not None}
        if self.board is not None:
            for key, value in scalars.items():
                self.board.add_scalar(key, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(scalars, step=record["step"])

    def _show(self, record: dict, seconds: float) -> None:
        losses = [loss for loss in record["group_loss"] if loss is not None]
        worst = max(losses, default=float("nan"))
        loss = "not finite, step skipped"
        if record["loss"] is not None:
            loss = f"{record['loss']:.4f}"
        figures = (
            f"loss {loss}  worst group {worst:.4f}  lr {record['lr']:.2e}  grad-norm "
            f"{record['grad_norm'] or 0:.3f}  "
            f"{record['tokens_per_s']:,.0f} tok/s ({record['tokens_per_s'] / self.runtime.world:,.0f}/rank)"
        )
        if torch.cuda.is_available():
            figures += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            if self.flops_per_token:
                figures += f"  MFU {self._mfu(record['tokens_per_s']):.1%}"
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], figures=figures)
            return
        eta = duration((self.total - record["step"]) * seconds)
        print(f"step {record['step']}/{self.total}  {figures}  eta {eta}", flush=True)

    def _mfu(self, tokens_per_s: float) -> float:
        """Model FLOP utilisation: share of the dense bf16 peak that the model's own products use.

        A GPU that `PEAK_FLOPS` does not have shows 0.
        """
        name = torch.cuda.get_device_name()
        peak = float("inf")
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                peak = flops
        return tokens_per_s * self.flops_per_token / (peak * self.runtime.world)

    def validation(self, record: dict) -> None:
        """One line of validation.jsonl, at once."""
        if self.runtime.is_main:
            self.validations.write(json.dumps(finite(record)) + "\n")
            self.validations.flush()

    def note(self, text: str) -> None:
        """A line between progress lines, e.g. a validation."""
        if self.runtime.is_main:
            if self.bar is not None:
                self.bar.console.print(text)
            else:
                print(text)
            sys.stdout.flush()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
            self.close()

    def close(self) -> None:
        """Writes what is pending and closes every file and board."""
        self.flush()
        if self.runtime.is_main:
            self.stream.close()
            self.validations.close()
        if self.bar is not None:
            self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "log.tensorboard = true, but tensorboard is not installed", "pip install 'gdrt-ds[tensorboard]'"
        ) from None
    # Steps behind the checkpoint that this life goes on from are taken again: the earlier life's are hidden.
    purge_step = first_step + 1 if first_step else None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)


def _wandb(config: RunConfig, folder: Path):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb = true, but wandb is not installed", "pip install 'gdrt-ds[wandb]'"
        ) from None
    # After a requeue the run goes on under the same id. Steps that are repeated from the last checkpoint are
    # the same to the bit, and Weights & Biases keeps the first it got.
    return wandb.init(
        project=config.log.wandb_project,
        name=folder.name,
        id=wandb_id(folder),
        resume="allow",
        dir=str(folder),
        config=config.model_dump(mode="json"),
    )


def wandb_id(folder: Path) -> str:
    """Returns the run's id at Weights & Biases: made once and kept in RUN/wandb_id."""
    path = folder / "wandb_id"
    if not path.is_file():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
