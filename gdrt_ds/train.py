"""Trains one run.

    deepspeed gdrt_ds/train.py --config configs/x.yaml [--deepspeed_config FILE] [key.sub=value ...]
    deepspeed --module gdrt_ds.train ...          the same from an installed wheel; gdrt-train starts it so

It runs under torchrun, srun and plain python (one rank) too. --plan prints the resolved config, the batch
arithmetic and a memory estimate per rank, and exits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

# `deepspeed gdrt_ds/train.py` puts gdrt_ds/ first on sys.path; its modules are imported through the package.
_here = Path(__file__).resolve().parent
if __name__ == "__main__" and not __package__:
    sys.path[:] = [str(_here.parent), *(p for p in sys.path if p and Path(p).resolve() != _here)]

from gdrt_ds.completion import offer_completion  # noqa: E402 - found by the lines above
from gdrt_ds.invocation import command_name, put_own_packages_first  # noqa: E402 - found by the lines above

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

INTERRUPTED = "nothing was published after the last checkpoint"
MEMORY_FIX = (
    "set train.micro_batch lower (accumulation keeps train.global_batch, and losses do not change), "
    "model.gradient_checkpointing=true, prompt.max_length lower, more ranks (ZeRO-3 shards the base), "
    "or --deepspeed_config ds_configs/zero3_offload.json; --plan predicts the peak"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("train.py"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="run config (YAML); every key has a default")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, overrides the key `deepspeed`")
    parser.add_argument("--plan", action="store_true", help="print the plan and exit")
    parser.add_argument(
        "--world", type=int, help="with --plan: ranks to plan for (default: those of this launch)"
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --plan: plan for GPUs of so many GiB, on a machine without them",
    )
    # The deepspeed launcher adds it.
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's"
    )
    offer_completion(parser)
    arguments = parser.parse_intermixed_args(argv)
    for option in ("world", "gpu_memory"):
        if getattr(arguments, option) is not None and not arguments.plan:
            parser.error(f"--{option.replace('_', '-')} without --plan: only a plan reads it")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    put_own_packages_first()
    from gdrt_ds.runtime import detect_rank, name_accelerator, prepare_libraries, report_user_errors

    name_accelerator()
    with report_user_errors(interrupted=INTERRUPTED, memory_fix=MEMORY_FIX):
        from gdrt_ds.config import load_config

        config = load_config(arguments.config, arguments.overrides)
        if arguments.deepspeed_config:
            config.deepspeed = arguments.deepspeed_config
        prepare_libraries()  # before the plan imports them
        from gdrt_ds.planning.plan import planned_device, print_plan

        rank = detect_rank()
        if rank["rank"] == 0 or arguments.plan:
            print_plan(
                config,
                arguments.world or rank["world"],
                full=arguments.plan,
                quiet=rank["rank"] != 0,
                device=planned_device(arguments.gpu_memory if arguments.plan else None),
            )
        if arguments.plan:
            return 0
        from gdrt_ds.runtime import ignore_stop_signals, start_runtime
        from gdrt_ds.training.run import run_training

        runtime = start_runtime(config.train.timeout_s)
        status = run_training(config, runtime)
        ignore_stop_signals()
        import torch.distributed as dist

        dist.destroy_process_group()
        return status
    return 0


def leave(status: int) -> NoReturn:
    """Ends the process at once; all is written and closed.

    A rank that was done has been seen to abort (status 134) in what Python tears down at exit.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
