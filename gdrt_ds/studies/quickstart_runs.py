"""What `python -m gdrt_ds.quickstart` runs: the same commands that a user would type, shown and timed.

Three parts, each with what the others cannot show in a few minutes of two cores:

    planted   a generated corpus, where the truth is known and the effect is visible in a minute
    learnt    a small transformer on MovieLens-100k, from scratch, until it predicts better than popularity
    language  SmolLM2-135M-Instruct, 4-bit base, on MovieLens-100k: how a language model is tuned and scored

The first two train SFT and GDRT from the same seed and data, evaluate both and compare them. The third trains
GDRT only, and compares it with the untuned model.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY, in_checkout
from gdrt_ds.invocation import safe_environment
from gdrt_ds.runtime import free_port

OBJECTIVES = ("sft", "gdrt")

# The tiny model scores thousands of prompts a second, so many users are audited.
PLANTED_AUDIT = ("--audit", "sensitivity,information,language", "--audit-users", "200")

# The users are those whose history is swapped.
LEARNT_AUDIT = ("--audit", "sensitivity,information,language", "--audit-users", "100")
LANGUAGE_AUDIT = ("--audit", "sensitivity,information", "--audit-users", "16")

LEARNT_SETTINGS = (
    "train.epochs=2",
    "train.global_batch=80",
    "train.micro_batch=80",
    "train.lr=0.002",
    "train.eval_every=500",
    "dro.tau=3",
    "data.limit_test=1000",
)
"""What differs from configs/small_transformer.yaml: two passes in small steps, not ten to convergence."""

# SASRec would take minutes to train; the page of the quick start says how to add it.
QUICK_FLOORS = ("--floors", "popularity,markov")

LAUNCHER_CHATTER = ("[20", "W1", "DeepSpeed deepspeed.ops")
"""How lines begin that are kept in the log and not shown."""


def ranks_here() -> int:
    """The number of GPUs, or two CPU ranks where there is none."""
    import torch

    return torch.cuda.device_count() or 2


def planted(base: Path, ranks: int) -> dict[str, float]:
    """Runs the part on the planted corpus below the folder `base`; returns the seconds of each command."""
    seconds = {}
    for objective in OBJECTIVES:
        run = base / f"planted-{objective}"
        seconds[f"planted {objective}"] = _train("configs/planted.yaml", run, ranks, f"objective={objective}")
        seconds[f"planted eval {objective}"] = _evaluate(run, _evaluation_of(run), *PLANTED_AUDIT)
    evaluations = [_evaluation_of(base / f"planted-{objective}") for objective in OBJECTIVES]
    seconds["planted compare"] = _compare(evaluations, base / "planted-comparison")
    return seconds


def learnt(base: Path) -> dict[str, float]:
    """Runs the part with the small transformer below the folder `base`; returns each command's seconds.

    It takes one rank: a model this small is faster there, with all cores, than on several.
    """
    seconds = {}
    for objective in OBJECTIVES:
        run = base / f"learnt-{objective}"
        settings = [f"objective={objective}", *LEARNT_SETTINGS]
        seconds[f"learnt {objective}"] = _train("configs/small_transformer.yaml", run, 1, *settings)
        seconds[f"learnt eval {objective}"] = _evaluate(run, _evaluation_of(run), *LEARNT_AUDIT)
    evaluations = [_evaluation_of(base / f"learnt-{objective}") for objective in OBJECTIVES]
    seconds["learnt compare"] = _compare(evaluations, base / "learnt-comparison")
    return seconds


def language(base: Path, ranks: int, steps: int | None) -> dict[str, float]:
    """Runs the part with the language model below the folder `base`; returns the seconds of each command.

    Args:
        steps: optimizer steps; None = those of configs/quickstart.yaml.
    """
    seconds = {}
    budget = [f"train.max_steps={steps}"] if steps else []
    run, untuned = base / "quickstart-gdrt", _evaluation_of(base / "quickstart-base")
    seconds["language gdrt"] = _train("configs/quickstart.yaml", run, ranks, *budget)
    seconds["language eval base"] = _evaluate(run, untuned, "--base")
    seconds["language eval gdrt"] = _evaluate(run, _evaluation_of(run), *LANGUAGE_AUDIT)
    seconds["language compare"] = _compare([untuned, _evaluation_of(run)], base / "quickstart-comparison")
    return seconds


def _evaluation_of(run: Path) -> Path:
    return run.with_name(f"{run.name}-eval")


def _train(config: str, run: Path, ranks: int, *overrides: str) -> float:
    script = ["gdrt_ds/train.py"] if in_checkout() else ["--module", "gdrt_ds.train"]
    port = str(free_port())  # another job on this machine may hold DeepSpeed's own
    launch = ["deepspeed", "--master_port", port, "--num_gpus", str(ranks), *script, "--config", config]
    return show([*launch, f"run.dir={run}", "run.overwrite=true", *overrides], _log_of(run))


def _evaluate(run: Path, output: Path, *arguments: str) -> float:
    command = [sys.executable, "-m", "eval.run", "--run", str(run), "--output", str(output), "--overwrite"]
    return show([*command, *QUICK_FLOORS, *arguments], _log_of(output))


def _compare(evaluations: list[Path], output: Path) -> float:
    command = [sys.executable, "-m", "eval.compare", *map(str, evaluations), "--output", str(output)]
    return show(command, _log_of(output))


def _log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def show(command: list[str], log: Path) -> float:
    """Runs one command, in the checkout where there is one, and returns its seconds.

    Its output is shown and kept in `log`.

    Raises:
        UserError: the command failed; names the log.
    """
    print("\n$ " + " ".join("python" if part == sys.executable else part for part in command), flush=True)
    started = time.time()
    # The launcher of this very environment comes first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A checkout is imported from the folder where the command runs. Elsewhere that folder is the user's
    # and may have an eval/ of its own.
    environment = os.environ if in_checkout() else safe_environment()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY if in_checkout() else None,
            env=environment | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout:
            stream.write(line)
            if not line.startswith(LAUNCHER_CHATTER):
                print("  " + line.rstrip(), flush=True)
        status = process.wait()
    if status:
        raise UserError(f"the command above ended with status {status}", f"its whole output is in {log}")
    return time.time() - started
