"""Says what this machine has, what a run would use of it, what is missing and what to do.

    gdrt-doctor [--dir runs] [--json]

The status is 0 if a run would start with a model of your own, and 1 if something essential is missing. Put
its output into a report of a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdrt_ds.completion import offer_completion
from gdrt_ds.invocation import command_name, put_own_packages_first
from gdrt_ds.planning.diagnosis import OPTIONAL, choices, findings
from gdrt_ds.planning.machine import describe_machine


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m gdrt_ds.commands.doctor"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", default="runs", help="where runs will be written (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    offer_completion(parser)
    return parser.parse_args(argv)


def gib(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return "unknown"
    return f"{count / 2**30:.1f} GiB"


def lines_of(machine: dict[str, Any]) -> list[str]:
    """The facts of a machine, one line each."""
    own, cpu, memory = machine["gdrt_ds"], machine["cpu"], machine["memory"]
    lines = [
        f"gdrt-ds      {own['version']}, {'checkout' if own['checkout'] else 'installed'} in {own['folder']}",
        f"python       {machine['python']['version']}, {machine['python']['executable']}",
        f"system       {machine['system']}",
        f"cpu          {cpu['model']}, {cpu['cores']} core(s), {' '.join(cpu['flags']) or 'no known flags'}",
        f"memory       {gib(memory['total_bytes'])}, {gib(memory['available_bytes'])} available",
    ]
    for gpu in machine["gpus"] or []:
        about = f"{gpu['name']}, capability {gpu['capability']}, {gib(gpu['memory_bytes'])}"
        lines.append(f"gpu          {about}, runtime {gpu['driver_runtime']}")
    if not machine["gpus"]:
        lines.append("gpu          none that torch can use")
    for row in machine["disks"]:
        lines.append(f"disk         {row['purpose']}: {row['folder']}, {gib(row['free_bytes'])} free")
    addresses = [f"{row['name']} {row['address']}" for row in machine["network"]]
    lines.append(f"network      {', '.join(addresses) or 'no interface with an IPv4 address'}")
    lines.append(f"compiler     {machine['compiler'] or 'none'}; ninja {machine['ninja'] or 'none'}")
    commands = [name for name, path in machine["slurm"].items() if path]
    lines.append(f"slurm        {' '.join(commands) or 'not here'}")
    for row in {row["name"]: row for row in machine["packages"]}.values():
        mark = "" if row["fits"] else "   <-- see below"
        if row["extra"] is None or (row["installed"] and row["name"] in OPTIONAL):
            lines.append(
                f"package      {row['name']} {row['installed'] or 'missing'} ({row['supported']}){mark}"
            )
    return lines


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit status."""
    options = parse(argv)
    put_own_packages_first()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cache = Path(os.environ.get("GDRT_CACHE") or Path.home() / ".cache" / "gdrt_ds").expanduser()
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet on stdout
        machine = describe_machine(Path(options.dir), cache)
        chosen, failed = choices()
        problems = [*failed, *findings(machine)]
    ready = not any(problem.essential for problem in problems)
    if options.json:
        body = {"ready": ready, "machine": machine, "choices": chosen, "findings": [*map(asdict, problems)]}
        print(json.dumps(body, indent=1))
        return 0 if ready else 1
    print("\n".join(lines_of(machine)))
    print("\nA run with default settings would use")
    print("\n".join(f"  {name:<13} {value}" for name, value in chosen.items()))
    for problem in problems:
        print(f"\n{'MISSING' if problem.essential else 'note'}: {problem.problem}\n  fix: {problem.fix}")
    print("\nready: a run would start" if ready else "\nnot ready: something essential is missing")
    return 0 if ready else 1


if __name__ == "__main__":
    raise SystemExit(main())
