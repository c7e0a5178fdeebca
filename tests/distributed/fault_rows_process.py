"""Rows about processes that misbehave: NaN, hung ranks, signals, memory, full disks, late processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.fault_site import Row, Site, metrics, need, need_same, newest, summary, wait_for
from tests.distributed.planting import left_out_step, nan_gradient, nan_loss, no_memory, pause, small_files
from tests.distributed.ranks import ROOT, free_port

WORLD = 2


def nan_stop(site: Site, quick: bool) -> str:
    for victim in (1,) if quick else (0, 1):
        run = site.fresh("nan_stop")
        done = site.play(run, WORLD, nan_loss(victim, step=2))
        need(done.statuses == [2, 2], f"ended with {done.statuses}\n{done.text[-2000:]}")
        need(
            all("step 3: NaN or inf in the loss of some rank" in text for text in done.outputs),
            "not every rank names the step",
        )
        need(
            all(text.count("an optimizer step") == 2 for text in done.outputs),
            f"optimizer steps: {[t.count('an optimizer step') for t in done.outputs]}",
        )
        need(
            newest(run) == 2 and [m["step"] for m in metrics(run)] == [1, 2],
            f"newest checkpoint {newest(run)}",
        )
        need(summary(run) == "failed", f"summary says {summary(run)}")
    return "both ranks stop in step 3, before the optimizer; step 2 is the newest checkpoint; status 2"


def nan_in_gradient(site: Site, quick: bool) -> str:
    run = site.fresh("nan_gradient")
    done = site.play(run, WORLD, nan_gradient(1, step=2))
    need(done.statuses == [2, 2], f"ended with {done.statuses}\n{done.text[-2500:]}")
    need(
        all("step 3: NaN or inf in the gradients of some rank" in text for text in done.outputs),
        done.text[-2500:],
    )
    need(newest(run) == 2 and [m["step"] for m in metrics(run)] == [1, 2], f"newest checkpoint {newest(run)}")
    site.finish(run, WORLD)
    need_same(run, site.straight(WORLD), "resumed after a NaN gradient")
    return (
        "both ranks stop in that step, before the optimizer; step 2 is the newest checkpoint and the "
        "resumed run equals the undisturbed one"
    )


def nan_skip(site: Site, quick: bool) -> str:
    cases = (
        [{"objective": "gdrt"}]
        if quick
        else [
            {"objective": "gdrt"},
            {"objective": "sft"},
            {"objective": "gdrt", "model__quantization": "none", "dro__estimate": "ema"},
        ]
    )
    for changes in cases:
        skipped, left_out = site.fresh("nan_skip"), site.fresh("left_out")
        done = site.play(skipped, WORLD, nan_loss(1, step=2), train__on_nonfinite="skip", **changes)
        need(done.statuses == [0, 0], f"{changes}: ended with {done.statuses}\n{done.text[-2000:]}")
        need(
            all(text.count("an optimizer step") == 7 for text in done.outputs),
            f"{changes}: optimizer steps {[t.count('an optimizer step') for t in done.outputs]}",
        )
        other = site.play(left_out, WORLD, left_out_step(2), **changes)
        need(
            other.statuses == [0, 0],
            f"the run without step 3 ended with {other.statuses}\n{other.text[-2000:]}",
        )
        rows = metrics(skipped)
        need(
            rows[2]["skipped"]
            and rows[2]["loss"] is None
            and not any(r["skipped"] for r in rows[:2] + rows[3:]),
            f"metrics of step 3: {rows[2]}",
        )
        for a, b in list(zip(rows, metrics(left_out), strict=True))[3:]:
            need(
                (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"]),
                f"{changes}: step {a['step']}: {a['loss']} against {b['loss']}",
            )
        name = "adapter/adapter_model.safetensors"
        need(
            (skipped / name).read_bytes() == (left_out / name).read_bytes(), f"{changes}: the adapters differ"
        )
    return (
        f"{len(cases)} objectives: every rank skips step 3; the rest equals, to the bit, a run without that "
        "step"
    )


def hung_rank(site: Site, quick: bool) -> str:
    waited, limit = [], 12
    for rank, phase in [(1, "")] if quick else [(0, ""), (1, ""), (1, "data loading"), (0, "saving")]:
        run = site.fresh("hung")
        job = site.start(run, WORLD, pause(phase) if phase else None, train__timeout_s=limit)
        marker = f"PHASE {phase}" if phase else "step 2/"
        need(
            job.until(marker, rank=rank if phase else 0), f"`{marker}` did not come: {job.output(0)[-2000:]}"
        )
        job.signal(signal.SIGSTOP, rank)
        struck, other = time.monotonic(), 1 - rank
        wait_for(
            lambda: job.poll() or job.statuses[other] is not None, limit + 20, "the live rank did not end"
        )
        waited.append(time.monotonic() - struck)
        job.signal(signal.SIGKILL, rank)
        done = job.wait(10)
        need(
            done.statuses[other] == 70,
            f"the live rank ended with {done.statuses[other]}\n{done.outputs[other][-1500:]}",
        )
        stacks = (run / "logs" / f"stacks_rank_{other}.txt").read_text()
        need("run.py" in stacks, f"the stacks do not show the run: {stacks[:500]}")
    return f"status 70 and stacks after {max(waited):.1f} s (train.timeout_s={limit})"


def signals(site: Site, quick: bool) -> str:
    straight, seen = site.straight(WORLD), 0
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    for index, phase in enumerate(("data loading", "relevance scoring", "training", "saving")):
        for number in [numbers[index % 3]] if quick else numbers:
            ranks = (seen % 2,) if seen % 3 else ()  # some to one rank only, some to all
            run = site.fresh("signalled")
            job = site.start(run, WORLD, pause(phase, 1.0))
            need(job.until(f"PHASE {phase}"), f"{phase} did not come: {job.output(0)[-2000:]}")
            for rank in ranks or range(WORLD):
                need(job.until(f"PHASE {phase}", rank=rank), f"{phase} did not come on rank {rank}")
            job.signal(number, *ranks)
            done = job.wait(120)
            words = (
                f"{signal.Signals(number).name} in {phase} to "
                f"{'rank ' + str(ranks[0]) if ranks else 'all ranks'}"
            )
            need(done.statuses == [75, 75], f"{words}: ended with {done.statuses}\n{done.text[-2500:]}")
            need(summary(run) == "interrupted", f"{words}: summary says {summary(run)}")
            saved = newest(run)
            need(saved == 0 if index < 2 else saved >= 3, f"{words}: newest checkpoint {saved}")
            if not quick or index == 2:
                site.finish(run, WORLD)
                need_same(run, straight, words)
            seen += 1
    return (
        f"{seen} signals: both ranks end with status 75, in training and saving with a checkpoint; resumed "
        "runs equal the undisturbed one"
    )


def out_of_memory(site: Site, quick: bool) -> str:
    run = site.fresh("memory")
    done = site.play(run, WORLD, no_memory(1, step=2))
    need(done.statuses == [70, 2], f"ended with {done.statuses}\n{done.text[-2500:]}")
    line = next(
        (line for line in done.outputs[1].splitlines() if line.startswith("error: rank 1: out of memory")), ""
    )
    need(
        line
        and all(
            knob in done.outputs[1]
            for knob in ("train.micro_batch", "gradient_checkpointing", "zero3_offload.json")
        ),
        done.outputs[1][-1500:],
    )
    need(
        "Traceback" not in done.text and newest(run) == 2,
        f"newest checkpoint {newest(run)}\n{done.text[-2000:]}",
    )
    return "the rank says out of memory and names the knobs, its peer ends too; the last checkpoint stands"


def full_disk(site: Site, quick: bool) -> str:
    straight = site.straight(WORLD)
    for victim in (1,) if quick else (0, 1):
        run = site.fresh("full_disk")
        done = site.play(run, WORLD, small_files(victim, step=3))
        _full(done, run)
        site.finish(run, WORLD)
        need_same(run, straight, "after a full disk")
    how = "a file limit on each rank"
    run = site.fresh("full_tmpfs")
    folder = run / "checkpoints"
    if not quick and _mount(folder, "2m"):
        try:
            done = site.play(run, WORLD)
            _full(done, run, at_least=1)
            _mount(folder, "64m", "remount,")
            site.finish(run, WORLD)
            need_same(run, straight, "after a full file system")
        finally:
            subprocess.run(["umount", str(folder)], check=False)
        how += " and a small tmpfs"
    return (
        f"{how}: every rank ends with status 74 and says so, earlier checkpoints stand, the run goes on and "
        "ends equal"
    )


def _full(done, run: Path, at_least: int = 2) -> None:
    need(done.statuses == [74, 74], f"ended with {done.statuses}\n{done.text[-2500:]}")
    need(
        all("was not published" in text for text in done.outputs) and "free disk space" in done.outputs[0],
        done.text[-2000:],
    )
    need(
        newest(run) >= at_least and not list((run / "checkpoints").glob(".step_*")),
        f"newest checkpoint {newest(run)}, leftovers in {run}",
    )


def _mount(folder: Path, size: str, prefix: str = "") -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    call = ["mount", "-t", "tmpfs", "-o", f"{prefix}size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(call, capture_output=True).returncode:
        shutil.rmtree(folder.parent, ignore_errors=True)
        return False
    return True


def late_process(site: Site, quick: bool) -> str:
    run = site.fresh("late")
    old = site.start(run, WORLD)
    need(old.until("checkpoint: step 2 published"), f"no checkpoint: {old.output(0)[-2000:]}")
    old.signal(signal.SIGSTOP)
    site.finish(run, WORLD)
    kept = _contents(run)
    old.signal(signal.SIGCONT)
    done = old.wait(120)
    need(
        all(status not in (0, None) for status in done.statuses),
        f"the late process ended with {done.statuses}",
    )
    need(any("was taken over by start number 2" in text for text in done.outputs), done.text[-2000:])
    now = _contents(run)
    changed = [name for name in kept if now.get(name) != kept[name] and not name.startswith("logs/")]
    need(not changed, f"the late process changed {changed}")
    need_same(run, site.straight(WORLD), "the run that took over")
    return "a process that wakes up after another took over is refused and changes nothing"


def _contents(run: Path) -> dict[str, str]:
    return {
        str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in run.rglob("*")
        if p.is_file()
    }


def launcher(site: Site, quick: bool) -> str:
    run = site.fresh("launched")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nnodes",
        "1",
        "--nproc_per_node",
        str(WORLD),
        "--master_port",
        str(free_port()),
        str(ROOT / "gdrt_ds" / "train.py"),
        *site.arguments(run, train__max_steps=2000, train__save_every=50, train__keep_checkpoints=1),
    ]
    with open(site.folder / "launcher.log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(
                lambda: (run / "metrics.jsonl").is_file() or process.poll() is not None, 240, "no training"
            )
            ranks = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
            ).stdout.split()
            need(len(ranks) >= WORLD, f"torchrun has the children {ranks}")
            os.kill(int(ranks[-1]), signal.SIGKILL)
            struck = time.monotonic()
            status = process.wait(90)
        finally:
            if process.poll() is None:
                process.kill()
    need(status != 0, "torchrun ended with 0")
    return f"torchrun ends with status {status} after {time.monotonic() - struck:.1f} s"


ROWS = [
    Row("nan-stop", "NaN on one rank: all ranks stop in that step, before the optimizer", nan_stop),
    Row(
        "nan-gradient",
        "a finite loss with NaN gradients on one rank: all ranks stop in that step, before the optimizer",
        nan_in_gradient,
    ),
    Row("nan-skip", "train.on_nonfinite=skip: all ranks skip that step", nan_skip),
    Row(
        "hung-rank",
        "a rank stopped with SIGSTOP: the job ends non-zero within train.timeout_s with stacks",
        hung_rank,
    ),
    Row("signals", "SIGTERM, SIGUSR1, Ctrl-C in data loading, relevance scoring, training, saving", signals),
    Row("out-of-memory", "one line that says which knob to turn", out_of_memory),
    Row("full-disk", "disk full while saving: a clear message, the previous checkpoint stands", full_disk),
    Row("late-process", "an old process that wakes up publishes nothing", late_process),
    Row("launcher", "a rank of a launched job killed -9: the launcher ends non-zero", launcher),
]
