"""Where things are on disk and how files are written: one function for each decision that recurs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from gdrt_ds.errors import UserError, did_you_mean

REPOSITORY = Path(__file__).resolve().parents[1]
"""The folder that holds gdrt_ds/: the checkout, or site-packages."""


def in_checkout() -> bool:
    """Whether gdrt_ds is imported from a checkout of the project, and not from an installed wheel."""
    return (REPOSITORY / "pyproject.toml").is_file() and (REPOSITORY / "configs").is_dir()


def preset_root() -> Path:
    """Returns the folder of configs/, ds_configs/ and slurm/: the checkout, else the wheel's presets."""
    if in_checkout():
        return REPOSITORY
    return Path(str(resources.files("gdrt_ds") / "presets"))


def preset_path(path: str | Path) -> Path:
    """Returns where the file of a setting is: the user's own, else the shipped one of that name.

    Args:
        path: what the user gave. A relative path counts from the folder where the command runs, then from
            the checkout, or from the presets in the wheel: `configs/smoke.yaml` is found from any folder.

    Returns:
        a path that exists where one does, else the path as it was given.
    """
    own = Path(path)
    if own.is_file() or own.is_absolute():
        return own
    shipped = preset_root() / own
    if shipped.is_file():
        return shipped
    return own


def preset_names(folder: str, suffix: str) -> list[str]:
    """Returns the presets of one folder as a user types them, e.g. `configs/smoke.yaml`."""
    return [f"{folder}/{path.name}" for path in sorted((preset_root() / folder).glob(f"*{suffix}"))]


def no_such_preset(setting: str, path: str | Path, folder: str, suffix: str) -> UserError:
    """Returns the error for a file that is neither the user's nor a preset; it lists the presets.

    Args:
        setting: how the path was given, e.g. `--config`.
        folder: of the presets, e.g. `configs`.
        suffix: of their files.
    """
    known = preset_names(folder, suffix)
    hint = did_you_mean(Path(path).name, [Path(name).name for name in known], before=f"{folder}/")
    return UserError(
        f"{setting} {path}: no such file{hint}",
        f"give a file of your own (a relative path counts from {Path.cwd()}), or a shipped one: "
        f"{', '.join(known)}",
    )


def cache_folder() -> Path:
    """Returns $GDRT_CACHE, or ~/.cache/gdrt_ds; it is made if it is missing.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = Path(os.environ.get("GDRT_CACHE") or Path.home() / ".cache" / "gdrt_ds").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder {folder} cannot be made ({error.strerror})", "set GDRT_CACHE to a writable folder"
        ) from None
    return folder


@contextlib.contextmanager
def process_lock(path: Path) -> Iterator[None]:
    """Holds a file lock: one process at a time, the others of the machine wait here.

    The kernel releases the lock when its holder dies, so a killed process blocks nobody.
    """
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what stands there at the end replaces `path` at once.

    It may become a file or a folder. A reader sees the old content or the new one, never a part. If
    the block raises, the temporary is removed and `path` stays as it was. This is atomic on one
    file system; a folder can only replace nothing or an empty folder.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)
        raise


def set_usual_mode(path: str | Path) -> None:
    """Gives a file the mode that the umask says, as `open` does.

    safetensors (from 0.6) writes its files for their owner alone, and a group that shares a run folder could
    read everything but the weights.
    """
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one piece (see `replacing`)."""
    with replacing(Path(path)) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes JSON in one piece; NaN and infinity become null, so that every reader can parse the file."""
    write_text(path, json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_summary(run: str | Path) -> dict[str, Any]:
    """Returns the summary.json of a run; empty for a run that has not ended.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(run) / "summary.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:  # not JSON, or not UTF-8
        content = None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged: it is not the JSON object that a run writes at its end",
            "delete it and start the run's command again with resume=auto, which writes it again",
        )
    return content


def finite(value: Any) -> Any:
    """Returns a JSON tree in which NaN and infinity are None.

    Tuples, arrays and tensors become lists; NumPy scalars and tensors of one value become numbers.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def written_file(error: OSError) -> str:
    """The file that an error of the file system is about.

    A failed copy or rename names its source first and its destination second; what cannot be written is the
    destination.
    """
    return str(error.filename2 or error.filename or "a file")


def sha256_of(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
