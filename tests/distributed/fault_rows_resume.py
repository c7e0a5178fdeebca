"""Rows about resuming: save points, other world sizes, damaged checkpoint files."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.numpy import load_file

from tests.distributed.fault_site import SAVE_POINTS, Row, Site, metrics, need, need_same

# (ranks, changed settings): plain and NF4 bases, both estimates of the group losses, two orders of the step
# (early, late in two passes)
CELLS = [
    (1, {}),
    (2, {}),
    (1, {"model__quantization": "none", "dro__estimate": "ema"}),
    (2, {"model__quantization": "none", "dro__estimate": "ema"}),
    (2, {"dro__estimate": "ema"}),
    (2, {"model__quantization": "none"}),
]


def save_points(site: Site, quick: bool) -> str:
    resumed = 0
    for world, changes in CELLS[:2] if quick else CELLS:
        straight = site.straight(world, **changes)
        for step in (2, 3) if quick else SAVE_POINTS:
            run = site.copy_until(straight, "resumed", step)
            done = site.finish(run, world, **changes)
            need(
                f"resume: step {step} from" in done.outputs[0],
                f"did not resume at step {step}\n{done.outputs[0][-2000:]}",
            )
            need_same(run, straight, f"{world} ranks, {changes}, resumed at step {step}")
            resumed += 1
    return (
        f"{resumed} resumed runs of {2 if quick else len(CELLS)} settings: figures of every step, adapter, "
        "weights, moments, generators, DRO state equal"
    )


def other_world(site: Site, quick: bool) -> str:
    worst = 0.0
    for before, after in ((2, 1),) if quick else ((1, 2), (2, 1)):
        changes = {"model__lora__dropout": 0.0}
        straight = site.straight(before, **changes)
        run = site.copy_until(straight, "moved", 3)
        done = site.finish(run, after, **changes)
        need(
            f"saved on {before} ranks, now {after}" in done.outputs[0], "does not say that the world changed"
        )
        for a, b in zip(metrics(run), metrics(straight), strict=True):
            for key in ("loss", "objective", "grad_norm"):
                worst = max(worst, abs(a[key] - b[key]) / abs(b[key]))
            worst = max(
                worst, *(abs(x - y) for x, y in zip(a["group_weight"], b["group_weight"]) if y is not None)
            )
        adapters = [load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, straight)]
        apart = max(float(abs(adapters[0][name] - adapters[1][name]).max()) for name in adapters[1])
        need(
            worst <= 1e-5 and apart <= 1e-4,
            f"{before} -> {after} ranks: figures differ by {worst:.1e}, adapters by {apart:.1e}",
        )
    return f"largest relative difference {worst:.1e}"


def _truncate(path: Path) -> None:
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _flip(path: Path) -> None:
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    6: (_truncate, "bytes instead of"),
    5: (_flip, "differs from its checksum"),
    4: (lambda p: (p / "client.safetensors").unlink(), "is missing"),
    3: (lambda p: (p / "manifest.json").unlink(), "no manifest"),
}


def damaged_files(site: Site, quick: bool) -> str:
    straight = site.straight(2)
    run = site.copy_until(straight, "damaged", 6)
    for step, (damage, _) in DAMAGES.items():
        damage(run / "checkpoints" / f"step_{step}")
    explicit = site.play(run, 2, resume="step_6")
    need(
        explicit.statuses[0] == 2 and "the checkpoint is damaged" in explicit.text,
        f"an explicit damaged checkpoint gives {explicit.statuses}",
    )
    done = site.finish(run, 2)
    for step, (_, words) in DAMAGES.items():
        need(
            any(
                f"step_{step} is passed over" in line and words in line
                for line in done.outputs[0].splitlines()
            ),
            f"step_{step} was not passed over in words",
        )
    need("resume: step 2 from" in done.outputs[0], "did not go on from the newest valid checkpoint")
    need_same(run, straight, "resumed behind four damaged checkpoints")
    shutil.rmtree(run)
    return (
        "truncated, bit-flipped and missing files, missing manifest: passed over in words, the run ends equal"
    )


ROWS = [
    Row(
        "save-points",
        "resumed = straight to the bit, 6 save points, 1 and 2 ranks, across the epoch's end",
        save_points,
    ),
    Row("other-world", "1 -> 2 and 2 -> 1 ranks: equal up to rounding", other_world),
    Row("damaged-files", "the newest valid checkpoint is taken, the others are named", damaged_files),
]
