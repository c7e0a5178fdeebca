"""The first quarter of an hour: tunes by SFT and by GDRT from the same seed and data, evaluates, compares.

    python -m gdrt_ds.quickstart [--dir runs] [--steps N] [--skip-planted] [--ranks N]

Two parts: the planted-shortcut corpus, where the truth is known and the effect is visible in a minute,
then a real small language model on real data with a fixed token budget. Every command that runs is
printed: it is what a user would type.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY
from gdrt_ds.runtime import report_user_errors

PLANTED_AUDIT = (
    "--audit",
    "sensitivity,information,language",
    "--audit-users",
    "200",
)  # the tiny model scores thousands of prompts a second
AUDIT = ("--audit", "sensitivity,information", "--audit-users", "16")  # users whose history is swapped
ROOT = REPOSITORY


def ranks_here() -> int:
    """GPUs, or two CPU ranks."""
    import torch

    return torch.cuda.device_count() or 2


def run(command: list[str], log: Path) -> float:
    """Runs one command, its output shown and kept; returns seconds. Raises.

    UserError naming the log when it fails.
    """
    shown = " ".join("python" if part == sys.executable else str(part) for part in command)
    print(f"\n$ {shown}", flush=True)
    started = time.time()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            stream.write(line)
            if not line.startswith(
                ("[20", "W1", "DeepSpeed deepspeed.ops")
            ):  # launcher chatter stays in the log
                print("  " + line.rstrip(), flush=True)
        status = process.wait()
    if status:
        raise UserError(f"the command above ended with status {status}", f"its whole output is in {log}")
    return time.time() - started


def train(config: str, folder: Path, ranks: int, *overrides: str) -> float:
    command = [
        "deepspeed",
        "--num_gpus",
        ranks,
        "gdrt_ds/train.py",
        "--config",
        config,
        f"run.dir={folder}",
        "run.overwrite=true",
        *overrides,
    ]
    return run(command, folder.parent / f"{folder.name}.log")


def evaluate(run_dir: Path, output: Path, *arguments: str) -> float:
    return run(
        [sys.executable, "-m", "eval.run", "--run", run_dir, "--output", output, "--overwrite", *arguments],
        output.parent / f"{output.name}.log",
    )


def compare(folders: list[Path], output: Path) -> float:
    return run(
        [sys.executable, "-m", "eval.compare", *folders, "--output", output],
        output.parent / f"{output.name}.log",
    )


def planted(base: Path, ranks: int) -> dict[str, float]:
    seconds = {}
    for objective in ("sft", "gdrt"):
        seconds[f"planted {objective}"] = train(
            "configs/planted.yaml", base / f"planted-{objective}", ranks, f"objective={objective}"
        )
        seconds[f"planted eval {objective}"] = evaluate(
            base / f"planted-{objective}", base / f"planted-{objective}-eval", *PLANTED_AUDIT
        )
    seconds["planted compare"] = compare(
        [base / "planted-sft-eval", base / "planted-gdrt-eval"], base / "planted-comparison"
    )
    return seconds


def real(base: Path, ranks: int, steps: int | None) -> dict[str, float]:
    seconds, extra = {}, [f"train.max_steps={steps}"] if steps else []
    for objective in ("sft", "gdrt"):
        seconds[f"train {objective}"] = train(
            "configs/quickstart.yaml",
            base / f"quickstart-{objective}",
            ranks,
            f"objective={objective}",
            *extra,
        )
    seconds["eval base"] = evaluate(base / "quickstart-sft", base / "quickstart-base-eval", "--base", *AUDIT)
    for objective in ("sft", "gdrt"):
        seconds[f"eval {objective}"] = evaluate(
            base / f"quickstart-{objective}", base / f"quickstart-{objective}-eval", *AUDIT
        )
    folders = [base / f"quickstart-{name}-eval" for name in ("sft", "gdrt", "base")]
    seconds["compare"] = compare(folders, base / "quickstart-comparison")
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gdrt_ds.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", default="runs", help="where the run folders go")
    parser.add_argument("--ranks", type=int, help="default: one per GPU, or two CPU ranks")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of the real part (default: configs/quickstart.yaml)"
    )
    parser.add_argument("--skip-planted", action="store_true")
    options = parser.parse_args(argv)
    with report_user_errors():
        base, ranks, started = Path(options.dir), options.ranks or ranks_here(), time.time()
        seconds = {} if options.skip_planted else planted(base, ranks)
        seconds |= real(base, ranks, options.steps)
        print(
            "\nwhere the time went: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
        )
        print(f"quickstart: {time.time() - started:.0f} s in all, installation not counted")
        print(
            f"look at: {base}/quickstart-comparison/compare.html, {base}/planted-comparison/compare.html, "
            f"{base}/quickstart-gdrt-eval/report.html"
        )
        print('next: your own data, see README, section "Your own data"')
        (base / "quickstart.json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
