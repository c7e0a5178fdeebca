"""The commands on one card: training with prefix trees, a resume that must change nothing, and exact scores.

Other parts look at one product or one step. This one trains the planted corpus, goes on from a checkpoint in
the middle as after a kill, and scores the test windows on the card and on the processor of the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from gdrt_ds.config import load_config
from gdrt_ds.runtime import start_runtime
from gdrt_ds.training.run import run_training
from tests.distributed.fault_site import copy_until, metrics
from tests.gpu.rows import Row, Spot, at_most, same

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED = 6, 3
SETTINGS = [
    "data.planted={num_train: 480, num_valid: 32, num_test: 40}",
    "train.packing=prefix_tree",
    "train.micro_batch=32",
    f"train.max_steps={STEPS}",
    f"train.save_every={SAVED}",
    f"train.eval_every={STEPS}",
    "train.keep_checkpoints=5",
    "train.warmup_steps=2",
]


def run(spot: Spot) -> list[Row]:
    straight, resumed = Path(spot.folder) / "straight", Path(spot.folder) / "resumed"
    # Prefix trees round in bfloat16 on a card; the toy run keeps the dtype that its CPU multiplies anyway.
    settings = [*SETTINGS, f"model.dtype={'float32' if spot.dry else 'bfloat16'}"]
    rows = [same("training of the planted corpus: exit status", train(straight, settings), 0)]
    copy_until(straight, resumed, SAVED)
    rows.append(same("resumed in the middle: exit status", train(resumed, [*settings, "resume=auto"]), 0))
    found, wanted = (np.array([line["loss"] for line in metrics(folder)]) for folder in (resumed, straight))
    worst = np.abs(found / wanted - 1).max()  # numpy's maximum of a NaN is a NaN
    rows.append(at_most("resumed in the middle: losses of all steps, relative", worst, 1e-4))
    name = "adapter/adapter_model.safetensors"
    equal = (straight / name).read_bytes() == (resumed / name).read_bytes()
    rows.append(same("resumed in the middle: adapter bitwise the straight run's", equal, True))
    return rows + scores(spot, straight)


def train(folder: Path, settings: list[str]) -> int:
    config = load_config("configs/planted.yaml", [*settings, f"run.dir={folder}"])
    return run_training(config, start_runtime())


def scores(spot: Spot, folder: Path) -> list[Row]:
    """Scores on the card against its own items one by one, and against the scores on the processor."""
    here = evaluate(folder, "here", {})
    results = json.loads((here / "results.json").read_text())
    distance = results["exactness"]["difference_nats"]
    rows = [at_most("scoring: trees against titles one by one, nats", distance, 1e-3)]
    if spot.dry:
        return rows
    cpu = evaluate(folder, "cpu", {"CUDA_VISIBLE_DEVICES": ""})
    pairs = list(zip(predictions(here), predictions(cpu), strict=True))
    worst = np.abs([a["target_nll"] - b["target_nll"] for a, b in pairs]).max()
    rows.append(at_most("scoring: the card against the processor, nats per target", worst, 1e-3))
    firsts = sum(a["top_ids"][0] == b["top_ids"][0] for a, b in pairs)
    rows.append(Row("scoring: lists with the same first title on both", f"{firsts} of {len(pairs)}"))
    return rows


def evaluate(folder: Path, name: str, environment: dict[str, str]) -> Path:
    output = folder / "eval" / name
    command = [sys.executable, "-m", "eval.run", "--run", str(folder), "--floors", "popularity"]
    subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return output


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
