"""The grid of a sweep: objectives x seeds x temperatures, each a run with a name.

    python slurm/grid.py --objectives sft,gdrt --seeds 0,1 --taus 0.5,1 [--into runs/sweep]
        lists the runs, numbered
    python slurm/grid.py --index 3 ... -- --config configs/x.yaml key=value
        the arguments of run 3, quoted for a shell
    python slurm/grid.py --study configs/studies/x.yaml [--into DIR] [--index 3]
        the cells of a study file (gdrt_ds/studies/grid.py)

Without --seeds every run has the seed of the settings. Objectives without a temperature appear once per seed.
A study's run folders lie where `python -m
gdrt_ds.study FILE --dir INTO` looks for them: that command evaluates what the array has trained and writes
the page. Cells that read another cell's run folder ({run:ROW}) belong into a second array.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
if (HOME / "gdrt_ds").is_dir():  # a checkout; beside an installed wheel the folder is the user's
    sys.path.insert(0, str(HOME))

from gdrt_ds.errors import UserError  # noqa: E402
from gdrt_ds.files import preset_path  # noqa: E402
from gdrt_ds.studies.grid import Cell, cells_of, load_study  # noqa: E402

WITH_TAU = ("gdrt", "gdrt+msl")


def grid(objectives: list[str], seeds: list[str], taus: list[str]) -> list[Cell]:
    """Returns the cells in the order of the lists. The trainer checks the names.

    Raises:
        UserError: a value is not a number; temperatures for objectives that have none.
    """
    if any(taus) and objectives and not set(objectives) & set(WITH_TAU):
        raise UserError(
            f"--taus {','.join(taus)}: none of the objectives {', '.join(objectives)} has a temperature",
            f"leave --taus out, or add --objectives {WITH_TAU[0]}",
        )
    cells = []
    for objective in objectives or [""]:  # empty: the config's objective
        for tau in taus if objective in WITH_TAU or not objective else [""]:
            for seed in seeds:
                if not seed.isdigit():
                    raise UserError(f"--seeds: {seed!r} is not a whole number", "e.g. --seeds 0,1,2")
                try:
                    positive = not tau or float(tau) > 0
                except ValueError:
                    positive = False
                if not positive:
                    raise UserError(f"--taus: {tau!r} is not a positive number", "e.g. --taus 0.5,1")
                cells.append(_cell(objective, seed, tau))
    return list(dict.fromkeys(cells))


def _cell(objective: str, seed: str, tau: str) -> Cell:
    """One run; an empty objective or tau is the config's."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", objective) or "run"
    overrides = []
    if objective:
        overrides.append(f"objective={objective}")
    overrides.append(f"train.seed={seed}")
    if tau:
        name += f"-tau{tau}"
        overrides.append(f"dro.tau={tau}")
    return Cell(f"{name}-seed{seed}", tuple(overrides))


def split(text: str) -> list[str]:
    """Returns the parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a grid; submit.py has them too."""
    parser.add_argument("--objectives", type=split, default=[], metavar="A,B", help="default: the config's")
    parser.add_argument("--seeds", type=split, default=[], metavar="0,1", help="default: the config's")
    parser.add_argument(
        "--taus",
        type=split,
        default=[],
        metavar="0.5,1",
        help="temperatures of gdrt and gdrt+msl; default: the config's",
    )
    parser.add_argument(
        "--study", metavar="FILE", help="the grid of a study file, in place of the three lists"
    )
    parser.add_argument(
        "--into",
        help="folder of the run folders (default runs/sweep; with --study: of the study, runs/studies/NAME)",
    )


def seed_of(words: list[str]) -> str:
    """train.seed under the arguments of train.py; without --config those of the jobs' default config.

    Raises:
        UserError: wrong settings.
    """
    from gdrt_ds.config import load_config
    from gdrt_ds.train import parse

    train = parse(words)
    config = train.config or str(preset_path("configs/quickstart.yaml"))
    return str(load_config(config, train.overrides).train.seed)


def write_list(into: Path, cells: list[Cell]) -> Path:
    """Writes INTO/runs.txt, one run folder per line.

    Every array task writes the same content, so they replace it atomically.
    """
    into.mkdir(parents=True, exist_ok=True)
    temporary = into / f".runs.{os.uname().nodename}.{os.getpid()}"
    temporary.write_text("".join(f"{into / cell.name}\n" for cell in cells), encoding="utf-8")
    return temporary.replace(into / "runs.txt")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--index", type=int, help="the number of one run")
    args = parser.parse_args(words[:cut])
    try:
        settings: list[str] = []
        if args.study:
            study = load_study(args.study)
            folder = Path(args.into or Path("runs") / "studies" / study.name).absolute()
            cells = cells_of(study, folder)
            into = folder / "runs"
            settings = ["--config", study.config]
        else:
            seeds = args.seeds or [seed_of(words[cut + 1 :])]
            cells = grid(args.objectives, seeds, args.taus or [""])
            into = Path(args.into or "runs/sweep").absolute()
        if args.index is None:
            print(
                "\n".join(
                    f"{number}  {into / cell.name}  {' '.join(cell.overrides)}"
                    for number, cell in enumerate(cells)
                )
            )
            return 0
        if not 0 <= args.index < len(cells):
            raise UserError(
                f"array task {args.index}, but the grid has {len(cells)} runs",
                f"sbatch --array=0-{len(cells) - 1}",
            )
        write_list(into, cells)
        cell = cells[args.index]
        print(shlex.join([*settings, *words[cut + 1 :], *cell.overrides, f"run.dir={into / cell.name}"]))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
