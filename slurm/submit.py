"""Submits a chain of jobs - train, then evaluate, then compare - and tells how it goes.

    python slurm/submit.py --config configs/llama3_8b.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00 \\
        run.dir=runs/office
    python slurm/submit.py --config ... --objectives sft,gdrt --seeds 0,1,2 --into runs/sweep
        a grid, as job arrays
    python slurm/submit.py --config ... --dry-run
        shows every command and script, submits nothing
    python slurm/submit.py --status runs/office
        where the chain is, in words (exit status 1: it is broken)

Each job starts when the one before succeeded; if one fails, those that wait for it are cancelled. The tuned
model is compared with the base model it started from, and with the evaluation folders of --compare-with.
Settings of the site: docs/clusters.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
if (HOME / "gdrt_ds").is_dir():  # a checkout; beside an installed wheel the folder is the user's
    sys.path.insert(0, str(HOME))

from gdrt_ds.errors import UserError  # noqa: E402
from gdrt_ds.files import preset_path  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    from grid import add_arguments

    parser = argparse.ArgumentParser(
        prog="submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(preset_path("configs/quickstart.yaml")),
        help="run config (default: the quick start)",
    )
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON, overrides the key `deepspeed`")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the config's"
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("--dry-run", action="store_true", help="show every command and script, submit nothing")
    what.add_argument(
        "--status", metavar="FOLDER", help="run folder (or --into folder of a grid) whose chain to describe"
    )
    what.add_argument(
        "--plan",
        action="store_true",
        help="print the plan of the training here first (loads the data); stops if it is refused, else goes "
        "on and submits, unless --dry-run is there too",
    )
    what.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --plan: GiB of one GPU of the job, where this machine has none",
    )
    chain = parser.add_argument_group("the chain")
    chain.add_argument(
        "--prepare",
        action="store_true",
        help="a job of one node before the training: model conversion, tokens, relevance",
    )
    chain.add_argument("--no-base", action="store_true", help="leave out the evaluation of the base model")
    chain.add_argument(
        "--compare-with", nargs="+", default=[], metavar="DIR", help="evaluation folders to compare with"
    )
    chain.add_argument(
        "--eval-args",
        default="",
        metavar="'...'",
        help="more arguments of eval.run, e.g. '--mode full --audit all'",
    )
    add_arguments(parser.add_argument_group("a grid of runs (any of these makes job arrays)"))
    chain.add_argument(
        "--at-once", type=int, default=4, metavar="N", help="runs of a grid that may run at the same time"
    )
    shape = parser.add_argument_group("size of the jobs")
    shape.add_argument("--nodes", type=int, default=1, help="of the training")
    shape.add_argument("--eval-nodes", type=int, default=1)
    shape.add_argument(
        "--gpus-per-node", metavar="[TYPE:]N", help="one rank per GPU; without it ranks run on CPUs"
    )
    shape.add_argument("--ntasks-per-node", type=int, help="ranks per node (default: the GPUs, or 1)")
    shape.add_argument("--cpus-per-task", type=int, help="CPUs per rank (default: 8 with GPUs, else Slurm's)")
    shape.add_argument("--mem", help="memory per node, e.g. 200G")
    shape.add_argument("--time", help="of the training; it requeues itself at the end")
    shape.add_argument("--eval-time", help="of the other jobs")
    site = parser.add_argument_group("the site")
    for name in ("partition", "account", "qos", "constraint"):
        site.add_argument(f"--{name}")
    site.add_argument("--sbatch", default="", metavar="'...'", help="more options of sbatch, for every job")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.status:
            from chain_status import report

            text, broken = report(Path(args.status))
            print(text)
            return int(broken)
        from chain import build, show, submit
        from checks import check

        os.environ.setdefault("GDRT_HOME", str(HOME))
        if not {"GDRT_VENV", "GDRT_PYTHON", "GDRT_CONTAINER"} & os.environ.keys():
            os.environ["GDRT_PYTHON"] = sys.executable  # the jobs use the interpreter that submits them
        check(args)
        chain = build(args)
        print(show(chain) if args.dry_run else submit(chain))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
