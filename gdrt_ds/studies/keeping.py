"""Keeps what the page needs of a finished cell in one small file, and puts it back on another machine.

A study can take days, and its run folders hold checkpoints of gigabytes. A kept cell is a zip of the text
files of its run and of its evaluation: settings, losses, metrics, predictions. It has no weights. A study
that finds a kept cell counts it as done, so a grid can be continued where the runs themselves are gone.

Kept cells are shared, so they name no folder of the machine that made them: words stand for the study's
folder, the checkout, the home folder, and for data and models that a setting takes from a folder.
"""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY, replacing

KEPT_SUFFIXES = (".yaml", ".json", ".jsonl", ".md")
LARGEST_BYTES = 64 << 20
"""No text file of a run is larger. A zip that claims more is not one of ours."""
DAMAGED = (zipfile.BadZipFile, ValueError, lzma.LZMAError, zlib.error, EOFError, RuntimeError)
"""What `zipfile` raises for other files, damaged ones and kinds of compression that it does not know."""
STAMP = (1980, 1, 1, 0, 0, 0)
"""Time of every entry: the same files give the same zip."""


def keep_cell(run: Path, config: RunConfig, evaluation: Path, kept: Path) -> Path:
    """Writes `kept`/NAME.zip for the run folder NAME; returns its path.

    Args:
        run: folder of a completed run.
        config: its settings.
        evaluation: its evaluation, a folder below `run`.
        kept: folder of the kept cells.
    """
    target = packed_path(kept, run.name)
    kept.mkdir(parents=True, exist_ok=True)
    files = [*_text_files(run), *_text_files(evaluation)]
    places = _places(run, config)
    with replacing(target) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(run).as_posix(), STAMP)
            entry.compress_type = zipfile.ZIP_LZMA  # a quarter smaller than deflate, and these files are kept
            archive.writestr(entry, _without_places(file.read_text(encoding="utf-8"), places))
    return target


def packed_path(kept: Path, name: str) -> Path:
    """Where the folder `kept` has, or would have, the cell of this name."""
    return kept / f"{name}.zip"


def restore_cell(source: Path, run: Path, config: RunConfig) -> None:
    """Unpacks a kept cell into a run folder, whole or not at all.

    Args:
        source: the cell's file.
        run: where the run folder shall be; nothing or an empty folder.
        config: the settings that the cell has here; their folders stand where the maker's did.
    Raises:
        UserError: the file is no kept cell or is damaged, or the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                _check_entry(entry)
            run.parent.mkdir(parents=True, exist_ok=True)
            with replacing(run) as scratch:
                _unpack(archive, scratch, _places(run, config))
    except DAMAGED as problem:
        raise UserError(
            f"{source} is no kept cell of a study, or is damaged ({problem or type(problem).__name__})",
            "remove it; the cell is then trained again",
        ) from None
    except OSError as problem:
        raise UserError(
            f"{source} cannot be unpacked into {run} ({problem.strerror or problem})",
            f"free disk space, and remove {run} if it holds something else",
        ) from None


def _unpack(archive: zipfile.ZipFile, folder: Path, places: list[tuple[str, str]]) -> None:
    for entry in archive.infolist():
        target = folder / entry.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        text = archive.read(entry).decode("utf-8")
        target.write_text(_with_places(text, places), encoding="utf-8")


def _places(run: Path, config: RunConfig) -> list[tuple[str, str]]:
    """Folders of this machine, the longest first because it may lie in another, and the words for them."""
    settings = {
        "data.path": config.data.path,
        "data.items": config.data.items,
        "model.path": config.model.path,
    }
    places = [(path, f"{{{key}}}") for key, path in settings.items() if path and "/" in path]
    places += [
        (str(run.absolute().parent.parent), "{study}"),
        (str(REPOSITORY), "{repository}"),
        (str(Path.home()), "{home}"),
    ]
    return sorted(places, key=lambda pair: len(pair[0]), reverse=True)


def _without_places(text: str, places: list[tuple[str, str]]) -> str:
    """The text with words for the places where they are whole paths, or the beginnings of longer ones."""
    for place, word in places:
        if place in text and _names_a_folder(place):
            text = _replaced_path(text, place, word)
    return text


def _names_a_folder(place: str) -> bool:
    """Whether a path says enough to be replaced: the root, `..` and one name alone stand for too much."""
    named = [part for part in place.split("/") if part]
    return len(named) + place.startswith("/") >= 2


def _replaced_path(text: str, place: str, word: str) -> str:
    """The text with the word for the place, but not for its letters in the middle of another path.

    The letter of an escape in JSON, as in `\\n/home/me`, is no part of a path.
    """
    absolute = place.startswith("/")

    def choose(found: re.Match[str]) -> str:
        before = text[max(0, found.start() - 2) : found.start()]
        inside = re.search(r"[\w.~-]$" if absolute else r"[\w./~-]$", before)
        if inside and not re.fullmatch(r"\\[nrt]", before):
            return place
        return word

    after = "" if place.endswith("/") else r"(?![\w~-]|\.\w)"
    return re.sub(re.escape(place) + after, choose, text)


def _with_places(text: str, places: list[tuple[str, str]]) -> str:
    for place, word in places:
        text = text.replace(word, "" if place == "/" else place)
    return text


def _text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in KEPT_SUFFIXES)


def _check_entry(entry: zipfile.ZipInfo) -> None:
    """Raises ValueError for a name that leaves the run folder, is no text file, or is too large."""
    path = PurePosixPath(entry.filename)
    if path.is_absolute() or ".." in path.parts or path.suffix not in KEPT_SUFFIXES:
        raise ValueError(f"it holds {entry.filename!r}")
    if entry.file_size > LARGEST_BYTES:
        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes")
