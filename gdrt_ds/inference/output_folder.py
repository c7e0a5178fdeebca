"""The folder that an export writes: what is refused before the work, and how it appears in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gdrt_ds.errors import UserError
from gdrt_ds.files import replacing


def check_output(output: Path) -> Path:
    """Returns where an export goes: the folder that `--output` names, with links followed.

    Raises:
        UserError: it is a file, a folder in use, the working folder, or cannot be looked at.
    """
    try:
        found = output.resolve()
        if found.exists() and not found.is_dir():
            raise UserError(f"--output {output} is a file", "give a new or empty folder")
        if found.is_dir() and any(found.iterdir()):
            raise UserError(f"--output {output} is not empty", "choose another folder")
        if found == Path.cwd():
            raise UserError(
                f"--output {output} is the folder that you are in, which the export would replace",
                "give the name of a new folder",
            )
    except (OSError, RuntimeError) as error:  # resolve() calls a loop of links a RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {output} cannot be used ({reason})", "choose another folder") from None
    return found


@contextmanager
def writing_to(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that replaces it at the end (`files.replacing`).

    Args:
        output: from `check_output`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as scratch:
            yield scratch
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--output {output} cannot be written ({getattr(error, 'strerror', None) or error})",
            "free disk space or choose another folder",
        ) from None
