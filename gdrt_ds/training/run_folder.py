"""The run folder: who may write into it, and the files that outsiders rely on (README lists them).

`claim` refuses a folder in use, finished or foreign; `write_summary` is the last word of a run.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gdrt_ds.config import RunConfig, dump_config
from gdrt_ds.config.yaml_files import read_yaml
from gdrt_ds.errors import UserError
from gdrt_ds.files import REPOSITORY, in_checkout, read_summary, write_json, write_text

# Keys that may differ between the lives of one run: they change where or how, never what is computed.
FREE_ON_RESUME = (
    "run.",
    "log.",
    "resume",
    "deepspeed",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.timeout_s",
    "train.debug_sync",
    "train.on_nonfinite",
    "train.micro_batch",
    "train.packing",
    "model.attention",
    "model.loading",
    "model.gradient_checkpointing",
    "model.compile",
)
KEPT, ASIDE = ("life", ".life.lock", "logs", "cache"), ".overwritten"
ASIDE_ELSEWHERE = "overwritten"  # without the dot: a start removes dotted leftovers of saves
VERSIONED = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "triton",
    "flash-attn",
    "gdrt-ds",
)


BASES = ("base", "base.lock", "base_plain", "base_plain.lock")
"""Models that `--plan` already makes; the second is the one before tokens are added."""


def status(folder: Path) -> str | None:
    """Returns the status of summary.json, or None for a run that has not ended."""
    return read_summary(folder).get("status")


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in _flatten(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """Returns `key: before -> now` of every changed setting that changes what is computed.

    The settings are compared with those of the run in this folder. A setting that the run's version did not
    have yet counts as its default: new settings keep by default what was computed before them.
    """
    saved = Path(folder) / "config.yaml"
    if not saved.is_file():
        return []
    before = _flatten(read_yaml(saved, str(saved)))
    now = _flatten(config.model_dump(mode="json"))
    defaults = _flatten(RunConfig().model_dump(mode="json"))
    for key in now.keys() - before.keys():
        if key in defaults:
            before[key] = defaults[key]
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]


def refuse_changes(folder: Path, config: RunConfig) -> None:
    """Refuses to go on with a run under settings that compute something else.

    Raises:
        UserError: names them.
    """
    changed = changed_settings(folder, config)
    if changed:
        raise UserError(
            f"resume = {config.resume}: the settings of {folder} differ ({'; '.join(changed[:6])})",
            "resume with the saved settings, or start a new run.dir",
        )


def claim(config: RunConfig) -> Path:
    """Makes the run folder ready for this run; rank 0 calls it.

    Raises:
        UserError: not writable; holds a finished or foreign run; a resume that would compute something else.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        try:
            probe.write_text("x")
        finally:  # a full disk makes the file and then does not write it
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir = {folder}: not writable ({error.strerror})",
            "choose another run.dir, or free space and permissions",
        ) from None
    saved = folder / "config.yaml"
    foreign = not saved.is_file() and {p.name for p in folder.iterdir() if not _empty_checkpoints(p)} - {
        *KEPT,
        ASIDE,
        *BASES,
    }
    if config.run.overwrite and config.resume is None:
        if foreign:
            raise UserError(
                f"run.dir = {folder} holds files that are not a run; run.overwrite=true will not empty it",
                "choose another run.dir",
            )
        _set_aside(folder)
    elif foreign:
        raise UserError(
            f"run.dir = {folder} is in use: it holds files that are not a run", "choose another run.dir"
        )
    elif saved.is_file() and config.resume is None:
        raise UserError(
            f"run.dir = {folder} is in use: it holds a run (status: {status(folder) or 'not finished'})",
            "resume=auto goes on with it, run.overwrite=true empties it, or choose another run.dir",
        )
    elif saved.is_file():
        refuse_changes(folder, config)
    write_text(saved, dump_config(config))
    return folder


def _parts(folder: Path) -> list[tuple[list[Path], Path]]:
    """(what a run left, where an overwrite moves it), for each file system that a run lies on.

    RUN/checkpoints may be made before the run: a link to, or a mount of, a larger file system. It stays, and
    what is in it can only be moved within it.
    """
    checkpoints = folder / "checkpoints"
    elsewhere = checkpoints.is_dir() and (checkpoints.is_symlink() or checkpoints.is_mount())
    kept = (*KEPT, ASIDE, *(["checkpoints"] if elsewhere else []))
    own = [child for child in folder.iterdir() if child.name not in kept and not _empty_checkpoints(child)]
    parts = [(own, folder / ASIDE)]
    if elsewhere:
        inside = [child for child in checkpoints.iterdir() if child.name != ASIDE_ELSEWHERE]
        parts.append((inside, checkpoints / ASIDE_ELSEWHERE))
    return parts


def _empty_checkpoints(path: Path) -> bool:
    """A folder of checkpoints that was made before the run, or whose content an overwrite has moved."""
    return (
        path.name == "checkpoints" and path.is_dir() and {p.name for p in path.iterdir()} <= {ASIDE_ELSEWHERE}
    )


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _set_aside(folder: Path) -> None:
    """Moves the old run out of the way (run.overwrite).

    It is removed when the new one trains (`settle`); until then it can come back.
    """
    for own, aside in _parts(folder):
        if aside.is_dir():  # an earlier overwrite was killed before it trained: what it left is worth nothing
            for child in own:
                _remove(child)
            continue
        aside.mkdir()
        for child in own:
            child.rename(aside / child.name)


def settle(folder: Path) -> None:
    """Removes the run that was overwritten, when the new one trains."""
    for _, aside in _parts(folder):
        if aside.is_dir():
            shutil.rmtree(aside)


def release(folder: Path) -> bool:
    """Leaves the folder as a start found it that failed before anything was computed. Rank 0 calls it.

    Returns whether that was so.
    """
    checkpoints = folder / "checkpoints"
    if (folder / "metrics.jsonl").is_file() or checkpoints.is_dir() and not _empty_checkpoints(checkpoints):
        return False
    for own, aside in _parts(folder):
        for child in own:
            _remove(child)
        if aside.is_dir():
            for child in aside.iterdir():
                child.rename(aside.parent / child.name)
            aside.rmdir()
    return True


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_hash() -> str | None:
    """Returns the commit of the code, with + for local changes; None outside a checkout.

    An environment with an installed wheel can lie in a repository of the user's, whose commit says nothing
    about this code.
    """
    if not in_checkout():
        return None
    try:

        def call(*args):
            return subprocess.run(
                ["git", "-C", str(REPOSITORY), *args], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()

        return call("rev-parse", "HEAD") + (
            "+" if call("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def write_summary(folder: Path, state: str, **totals: Any) -> None:
    """Writes summary.json.

    Args:
        state: completed, interrupted (checkpointed, please requeue) or failed.
        totals: what else is known of the run.
    """
    body = {
        "status": state,
        **totals,
        "versions": versions(),
        "git_hash": git_hash(),
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(folder / "summary.json", body)
