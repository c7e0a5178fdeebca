"""The grid of a study: rows (an objective and its overrides) x settings x seeds, read from one YAML file
and numbered.

The one definition of cells for `gdrt_ds.study`, `slurm/grid.py --study` and the evaluation's page. A study
file:

    name: planted
    config: configs/planted.yaml        # every cell starts from this run config
    overrides: [train.log_every=100]    # settings of all cells
    seeds: [0, 1, 2]
    seed_keys: [train.seed]             # the settings that take the seed
    baseline: sft                       # the row that the others are compared with
    controls: [random-groups]           # rows that the remaining rows are compared with too
    rows:
      sft: [objective=sft]
      gdrt: [objective=gdrt]
      frozen-q: [objective=gdrt, "dro.frozen_weights={run:gdrt}"]     # {run:ROW}: that row's run folder,
      same setting and seed
    settings:                           # optional; each crosses all rows, or those it names
      default: []
      controls: {rows: [frozen-q], seeds: [0, 1], borrows: {default: [sft, gdrt]}}     # beside runs of a
      setting with the same `set`
    pieces:                             # optional: named parts of the grid, for machines with a time limit
      first: {rows: [sft, gdrt], settings: [default]}
    evaluate: [--audit, sensitivity]    # arguments of every evaluation
    ranks: 1                            # 1: many cells per process; more: `deepspeed --num_gpus R` per cell
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gdrt_ds.config.yaml_files import read_yaml
from gdrt_ds.errors import UserError, did_you_mean
from gdrt_ds.files import no_such_preset, preset_path

RUN_OF = re.compile(r"\{run:([^}]+)\}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Setting(Strict):
    """Overrides that rows share, and which rows and seeds it is crossed with (None = all)."""

    set: list[str] = Field(default_factory=list)
    rows: list[str] | None = None
    seeds: list[int] | None = None
    borrows: dict[str, list[str]] = Field(
        default_factory=dict
    )  # setting -> rows of it that stand beside this one's, not trained again


class Piece(Strict):
    rows: list[str] | None = None
    settings: list[str] | None = None
    seeds: list[int] | None = None


class Study(Strict):
    """A study file, validated. `settings` and `rows` keep their order."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    question: str = ""
    config: str
    overrides: list[str] = Field(default_factory=list)
    seeds: list[int] = Field(min_length=1)
    seed_keys: list[str] = Field(default_factory=lambda: ["train.seed"], min_length=1)
    baseline: str
    controls: list[str] = Field(default_factory=list)
    rows: dict[str, list[str]] = Field(min_length=1)
    settings: dict[str, Setting] = Field(default_factory=lambda: {"default": Setting()}, min_length=1)
    pieces: dict[str, Piece] = Field(default_factory=dict)
    evaluate: list[str] = Field(default_factory=list)
    ranks: int = Field(1, ge=1)
    label: list[str] = Field(
        default_factory=list,
        description="labels of the samples whose values get metrics of their own, e.g. kind; one may be "
        "written without a list",
    )

    @field_validator("label", mode="before")
    @classmethod
    def _one_label(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("settings", mode="before")
    @classmethod
    def _short_settings(cls, value: Any) -> Any:
        """A setting may be written as the list of its overrides alone."""
        if not isinstance(value, dict):
            return value
        return {name: {"set": part} if isinstance(part, list) else part for name, part in value.items()}


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name and the settings that make it."""

    name: str
    overrides: tuple[str, ...]
    row: str = ""
    setting: str = ""
    seed: int = 0
    needs: tuple[str, ...] = ()  # names of cells whose run folders it reads


def slug(text: str) -> str:
    """Returns a text as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-") or "run"


def load_study(path: str | Path, overrides: list[str] = ()) -> Study:
    """Reads a study file; `overrides` (key=value of run configs) go behind the study's own.

    Raises:
        UserError: missing file, unknown key or row, a row that reads the run folder of a later one.
    """
    file = preset_path(path)
    if not file.is_file():
        raise no_such_preset("study", path, "configs/studies", ".yaml")
    try:
        study = Study.model_validate(read_yaml(file, str(path)) or {})
    except ValidationError as error:
        raise UserError(
            f"{path}: " + "; ".join(_describe(e) for e in error.errors()),
            "see the head of gdrt_ds/studies/grid.py for the keys",
        ) from None
    study.overrides = [*study.overrides, *overrides]
    rows = list(study.rows)
    seen = []
    for name in [study.baseline, *study.controls]:
        _known(path, name, rows, "row")
    for name, own in study.rows.items():
        for needed in RUN_OF.findall(" ".join(own)):
            _known(path, needed, rows, "row")
            if needed not in seen:
                raise UserError(
                    f"{path}: row {name} reads the run folder of {needed}, which comes later",
                    f"move {needed} above {name}",
                )
        seen.append(name)
    for owner, parts in (("settings", study.settings), ("pieces", study.pieces)):
        for name, part in parts.items():
            for row in part.rows or []:
                _known(f"{path}: {owner}.{name}", row, rows, "row")
            for setting in getattr(part, "settings", None) or []:
                _known(f"{path}: {owner}.{name}", setting, list(study.settings), "setting")
            for setting, borrowed in getattr(part, "borrows", {}).items():
                _borrowable(path, study, name, setting, borrowed)
    return study


def _borrowable(path: object, study: Study, name: str, lender: str, rows: list[str]) -> None:
    """Checks that a setting may borrow rows of another one.

    Raises:
        UserError: `lender` is no earlier setting with the same overrides that has these rows and seeds.
    """
    where = f"{path}: settings.{name}.borrows"
    mine = study.settings[name]
    _known(where, lender, list(study.settings), "setting")
    other = study.settings[lender]
    for row in rows:
        _known(f"{where}.{lender}", row, other.rows or list(study.rows), "row")
        if mine.rows is None or row in mine.rows:
            raise UserError(
                f"{where}.{lender}: row {row} is also trained by {name}",
                f"leave it out of settings.{name}.rows or out of its borrows",
            )
    if other.set != mine.set:
        raise UserError(
            f"{where}: {lender} has other overrides ({other.set} against {mine.set})",
            "borrow from a setting with the same `set`",
        )
    absent = sorted(set(mine.seeds or study.seeds) - set(other.seeds or study.seeds))
    if absent:
        raise UserError(f"{where}: {lender} has no seed {absent}", f"give {name} seeds of {lender}")
    names = list(study.settings)
    if names.index(lender) > names.index(name):
        raise UserError(f"{where}: {lender} comes later", f"move {lender} above {name}")


def _known(where: object, name: str, names: list[str], what: str) -> None:
    if name not in names:
        raise UserError(
            f"{where}: there is no {what} {name!r}{did_you_mean(name, names)}",
            f"one of {', '.join(names)}",
        )


def _describe(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = [*Study.model_fields, *Setting.model_fields, *Piece.model_fields]
        return f"unknown key `{key}`{did_you_mean(key.rpartition('.')[2], known)}"
    return f"{key} = {error['input']!r}: {error['msg']}"


def cells_of(study: Study, folder: Path) -> list[Cell]:
    """All cells, settings outermost, then seeds, then rows: a row stands behind the rows whose run folders
    it reads.

    Raises:
        UserError: a setting that leaves out a row which one of its rows reads.
    """
    cells = []
    for setting_name, setting in study.settings.items():
        rows = [row for row in study.rows if setting.rows is None or row in setting.rows]
        owner = {row: setting_name for row in rows} | {
            row: lender for lender, lent in setting.borrows.items() for row in lent
        }
        for seed in setting.seeds or study.seeds:
            for row in rows:
                text = list(study.rows[row])
                needs = []
                for needed in dict.fromkeys(RUN_OF.findall(" ".join(text))):
                    if needed not in owner:
                        raise UserError(
                            f"setting {setting_name}: row {row} reads the run folder of {needed}, which the "
                            "setting leaves out",
                            f"add {needed} to the rows of {setting_name}",
                        )
                    needs.append(_name(study, owner[needed], needed, seed))
                text = [_with_run_folders(part, study, folder, owner, seed) for part in text]
                overrides = (
                    *study.overrides,
                    *setting.set,
                    *text,
                    *(f"{key}={seed}" for key in study.seed_keys),
                )
                cells.append(
                    Cell(
                        _name(study, setting_name, row, seed),
                        overrides,
                        row,
                        setting_name,
                        seed,
                        tuple(needs),
                    )
                )
    if len({cell.name for cell in cells}) < len(cells):
        twice = next(c.name for i, c in enumerate(cells) if c.name in {d.name for d in cells[:i]})
        raise UserError(
            f"two cells of the grid have the same name {twice}",
            "rows, settings and seeds must differ in letters or digits",
        )
    return cells


def _with_run_folders(text: str, study: Study, folder: Path, owner: dict[str, str], seed: int) -> str:
    """`{run:ROW}` in an override becomes the run folder of that row, for this seed."""

    def run_folder(match: re.Match) -> str:
        row = match[1]
        return str(folder / "runs" / _name(study, owner[row], row, seed))

    return RUN_OF.sub(run_folder, text)


def _name(study: Study, setting: str, row: str, seed: int) -> str:
    parts = [slug(row), f"seed{seed}"]
    if len(study.settings) > 1:
        parts.insert(0, slug(setting))
    return "-".join(parts)


def choose_cells(study: Study, cells: list[Cell], piece: str | None = None) -> list[Cell]:
    """Returns the cells of a piece, or all.

    Raises:
        UserError: unknown piece, or an empty one.
    """
    if piece is None:
        return cells
    _known("--piece", piece, list(study.pieces), "piece")
    part = study.pieces[piece]
    keep = [
        c
        for c in cells
        if (part.rows is None or c.row in part.rows)
        and (part.settings is None or c.setting in part.settings)
        and (part.seeds is None or c.seed in part.seeds)
    ]
    if not keep:
        raise UserError(f"--piece {piece} holds no cell", "see --list")
    return keep
