"""Trains one run on the ranks of this machine, or of the hosts of a hostfile.

    gdrt-train [OPTIONS OF THE DEEPSPEED LAUNCHER] --config configs/x.yaml [key.sub=value ...]

    gdrt-train --config configs/smoke.yaml                      all GPUs; one process where there is none
    gdrt-train --num_gpus 2 --config configs/smoke.yaml         two ranks; without GPUs two CPU ranks
    gdrt-train --hostfile hosts --config configs/x.yaml         several machines

Options of the launcher go first (`deepspeed --help` lists them). Everything from the first option or setting
of the training on goes to `gdrt_ds.train` unchanged. Under torchrun or srun this is one rank of their job.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from gdrt_ds import train
from gdrt_ds.completion import asked
from gdrt_ds.errors import UserError
from gdrt_ds.invocation import module_command, put_own_packages_first, safe_environment

TRAINING_OPTIONS = (
    "--config",
    "--deepspeed_config",
    "--plan",
    "--world",
    "--gpu-memory",
    "--local_rank",
    "--help",
    "-h",
)
HOSTFILE = Path("/job/hostfile")  # where DeepSpeed's launcher looks for other machines
SETTING = re.compile(r"[a-z_]+(\.[A-Za-z_0-9]+)*=")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns the launcher's words and the training's: these begin at the first that is one of theirs.

    Raises:
        UserError: an option of the launcher stands behind them.
    """
    first = next((place for place, word in enumerate(words) if _of_training(word)), len(words))
    for word in words[first:]:
        if word.startswith("-") and not _of_training(word) and not re.fullmatch(r"-[\d.]+", word):
            raise UserError(
                f"{word} is not an option of the training",
                "options of the DeepSpeed launcher go first: gdrt-train --num_gpus 2 --config FILE "
                f"key=value; the training knows {', '.join(TRAINING_OPTIONS[:5])}",
            )
    return words[:first], words[first:]


def _of_training(word: str) -> bool:
    return word.partition("=")[0] in TRAINING_OPTIONS or SETTING.match(word) is not None


def launch_command(launcher: list[str], training: list[str]) -> list[str]:
    """Returns the command that starts the ranks, with the launcher of this very environment.

    DeepSpeed's launcher takes port 29500 for every job, and the second job on a machine fails.
    Where all ranks are on this machine and no port is named, they get one that is free.
    """
    from gdrt_ds.runtime import free_port

    port = []
    named = {word.partition("=")[0] for word in launcher} & {"--hostfile", "-H", "--master_port"}
    if not named and not HOSTFILE.exists():
        port = ["--master_port", str(free_port())]
    command = module_command("deepspeed.launcher.runner")
    return [*command, *port, *launcher, "--module", "gdrt_ds.train", *training]


def needs_launcher(launcher: list[str], training: list[str]) -> bool:
    """Whether ranks have to be started: options of the launcher are given, or there are several GPUs.

    A plan needs no ranks, and a rank of torchrun or srun starts none.
    """
    from gdrt_ds.runtime import detect_rank

    if launcher:
        return True
    if {"--plan", "--help", "-h"} & set(training) or detect_rank()["launcher"] != "python":
        return False
    import torch

    return torch.cuda.device_count() > 1


def main() -> NoReturn:
    """The console script."""
    put_own_packages_first()
    from gdrt_ds.runtime import report_user_errors

    words = sys.argv[1:]
    if asked():
        train.parse([])
    if words in (["--help"], ["-h"]):
        print(__doc__)
    with report_user_errors():
        launcher, training = split_words(words)
    if needs_launcher(launcher, training):
        command = launch_command(launcher, training)
        # ninja, which builds DeepSpeed's extension, lies beside the interpreter.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        raise SystemExit(subprocess.call(command, env=safe_environment() | {"PATH": path}))
    train.leave(train.main(training))
