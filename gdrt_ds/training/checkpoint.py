"""Checkpoints that are published whole or not at all.

RUN/checkpoints/step_N/ holds

    rank_00000.safetensors   this rank's slices of float32 weights and optimizer state, and its random
                             generators; one file for each rank
    state.json               counters, schedule and the run's own state (DRO weights, data position)
    client.safetensors       the tensors of that state
    deepspeed/               DeepSpeed's own files for its tools, e.g. zero_to_fp32; they are pickles and
                             never read here
    manifest.json            step, world size, life, fingerprint of the frozen base, and size and SHA-256
                             of every file

A save writes into a temporary folder and syncs it. Then rank 0 renames it, and `latest` follows, atomically.
`find_latest_valid` trusts manifests only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gdrt_ds.errors import UserError
from gdrt_ds.files import sha256_of
from gdrt_ds.training import durable
from gdrt_ds.training.agreement import TAKEN_OVER, agree, attempt, rank_here, world_size
from gdrt_ds.training.engine_state import export_rng, export_state, import_rng, import_state
from gdrt_ds.training.lives import current_life, locked

MANIFEST = "manifest.json"
FORMAT = 1
STEP_PATTERN = re.compile(r"^step_(\d+)(\.replaced_\d+)?$")
TENSOR_KEY = "__tensor__"


@dataclass(frozen=True)
class Restored:
    """What `load` gives back beside the engine's state: the trainer's own, and where it came from."""

    step: int
    client_state: dict[str, Any]
    world: int
    same_world: bool
    path: Path


def save(
    engine,
    run_dir: str | Path,
    step: int,
    client_state: dict[str, Any],
    *,
    life: int,
    fingerprint: str,
    keep: int = 2,
    best_step: int | None = None,
    deepspeed_files: bool = True,
) -> Path:
    """Publishes RUN/checkpoints/step_<step>; every rank calls it.

    Args:
        client_state: nested dicts and lists of JSON values and tensors, the same on every rank.
        life: what `begin_life` returned for this start.
        fingerprint: of the frozen base (`LoadedModel.fingerprint`), compared at resume.
        keep: newest checkpoints that stay; the best one stays beside them.
        best_step: the step of the best validation so far, this one or one before.

    Raises:
        UserError: on every rank, if any rank could not write (disk full) or a newer life owns the run. The
            checkpoints published before are untouched, and the temporary folder is removed.
    """
    folder = Path(run_dir) / "checkpoints"
    final, scratch = folder / f"step_{step}", folder / f".step_{step}.life_{life}"
    rank, world = rank_here(), world_size()
    problem = attempt(lambda: _prepare(scratch), on=rank == 0)
    agree(engine, problem, scratch)
    problem = attempt(lambda: _write_own(engine, scratch, rank, step, client_state))
    agree(engine, problem, scratch)
    if deepspeed_files:
        agree(engine, _write_deepspeed_files(engine, scratch), scratch)
    about = {
        "format": FORMAT,
        "step": step,
        "world": world,
        "life": life,
        "fingerprint": fingerprint,
        "stage": engine.zero_optimization_stage(),
    }
    problem = attempt(lambda: _publish(Path(run_dir), scratch, final, about, keep, best_step), on=rank == 0)
    agree(engine, problem, scratch)
    return final


def find_latest_valid(run_dir: str | Path) -> Path | None:
    """Returns the newest checkpoint whose files all match its manifest, newest by (life, step), or None."""
    return search_valid(run_dir)[0]


def search_valid(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """Returns the newest valid checkpoint, and one line for every newer one that was passed over."""
    notes = []
    for _, path in _published(Path(run_dir) / "checkpoints"):
        problem = verify(path)
        if problem is None:
            return path, notes
        notes.append(f"{path.name} is passed over: {problem}")
    return None, notes


def resolve_resume(run_dir: str | Path, resume: str | None) -> tuple[Path | None, list[str]]:
    """Returns the checkpoint that `resume` means, and one line for every one that `auto` passed over.

    null means none, auto the newest valid one if there is any, and a path that one.

    Raises:
        UserError: an explicit path is missing or damaged.
    """
    if resume is None:
        return None, []
    if resume == "auto":
        return search_valid(run_dir)
    path = _checkpoint_named(run_dir, resume)
    problem = verify(path)
    if problem is not None:
        raise UserError(
            f"resume = {resume}: the checkpoint is damaged ({problem})",
            "resume=auto takes the newest valid one",
        )
    return path, []


def check_resume(run_dir: str | Path, resume: str | None) -> None:
    """Looks only whether the checkpoint that `resume` names is there; `resolve_resume` reads it.

    Raises:
        UserError: no such checkpoint.
    """
    if resume is not None and resume != "auto":
        _checkpoint_named(run_dir, resume)


def _checkpoint_named(run_dir: str | Path, resume: str) -> Path:
    """A checkpoint by its path, or by its name in the run folder.

    Raises:
        UserError: no such folder, or one that is no checkpoint.
    """
    folder = Path(run_dir) / "checkpoints"
    for path in (Path(resume), folder / resume):
        if path.is_dir():
            break
    else:
        known = ", ".join(p.name for _, p in _published(folder)) or "none"
        raise UserError(
            f"resume = {resume}: no such checkpoint folder",
            f"checkpoints of {run_dir}: {known}; or resume=auto",
        )
    if (path / "checkpoints").is_dir() and not (path / MANIFEST).is_file():
        known = ", ".join(str(p) for _, p in _published(path / "checkpoints")) or "it has none"
        raise UserError(
            f"resume = {resume}: that is a run folder and no checkpoint",
            f"name one of its checkpoints: {known}",
        )
    return path


def newest_step(run_dir: str | Path) -> int:
    """The step of the newest published checkpoint; 0 without one."""
    published = _published(Path(run_dir) / "checkpoints")
    return next((step for (life, step), _ in published if life != math.inf), 0)


def verify(path: Path) -> str | None:
    """Returns None if every file matches the manifest, else the first difference in words."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        body = {k: v for k, v in manifest.items() if k != "digest"}
        if manifest.get("digest") != _digest(body):
            return "the manifest does not match its own digest"
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} differs from its checksum"
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest is not readable ({error})"
    return None


def load(engine, path: str | Path, *, fingerprint: str | None = None, restore_rng: bool = True) -> Restored:
    """Puts a checkpoint that `resolve_resume` verified into a fresh engine; every rank gives the same path.

    On the world size of the checkpoint the state is restored to the bit. On another one the slices
    are cut anew, and the random generators are left as they are: the run then differs from the
    straight one by rounding, and by the masks of dropout inside attention.

    Raises:
        UserError: the checkpoint has another frozen base, other LoRA settings or another optimizer.
    """
    path = Path(path)
    manifest = json.loads((path / MANIFEST).read_text())
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{path.name} was trained on another frozen base (fingerprint {manifest['fingerprint'][:12]}, "
            "model.path now has "
            f"{fingerprint[:12]})",
            "restore model.path, its quantisation settings and model.dtype (`auto` depends on the machine: "
            "name the dtype that the run began in), or start a new run folder",
        )
    same_world = manifest["world"] == world_size()
    slices: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    rng: dict[str, Tensor] = {}
    for rank in range(manifest["world"]):
        for name, value in load_file(path / f"rank_{rank:05d}.safetensors").items():
            if name.startswith("rng."):
                if rank == rank_here():
                    rng[name] = value
                continue
            parameter, offset, key = name.rsplit("|", 2)
            slices.setdefault(parameter, {}).setdefault(key, []).append((int(offset), value))
    state = json.loads((path / "state.json").read_text())
    import_state(engine, slices, state["engine"])
    tensors = load_file(path / "client.safetensors") if (path / "client.safetensors").is_file() else {}
    if restore_rng and same_world:
        import_rng(rng)
    return Restored(manifest["step"], _join(state["client"], tensors), manifest["world"], same_world, path)


def _prepare(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _write_own(engine, scratch: Path, rank: int, step: int, client_state: dict) -> None:
    slices, common = export_state(engine)
    durable.save_tensors({**slices, **export_rng()}, scratch / f"rank_{rank:05d}.safetensors")
    if rank == 0:
        tensors: dict[str, Tensor] = {}
        plain = _split(client_state, "client", tensors)
        if tensors:
            durable.save_tensors(tensors, scratch / "client.safetensors")
        durable.write_text(
            scratch / "state.json", json.dumps({"step": step, "engine": common, "client": plain})
        )


def _write_deepspeed_files(engine, scratch: Path) -> str | None:
    """Lets DeepSpeed save, with its writes guarded.

    A rank whose disk is full must still reach DeepSpeed's barriers.
    """
    problems: list[str] = []
    writer = engine.checkpoint_engine
    original = writer.save

    def guarded(state_dict, path, *args, **kwargs):
        problem = attempt(lambda: original(state_dict, path, *args, **kwargs))
        if problem:
            problems.append(problem)

    copy_scripts = engine._copy_recovery_script

    def guarded_copy(folder):
        problem = _copied(copy_scripts, folder)
        if problem:
            problems.append(problem)

    writer.save = guarded
    engine._copy_recovery_script = guarded_copy
    try:
        engine.save_checkpoint(
            str(scratch), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True
        )
    finally:
        del writer.save
        del engine._copy_recovery_script
    return problems[0] if problems else None


def _copied(copy_scripts: Callable[[str], object], folder: str) -> str | None:
    """DeepSpeed's copy of its own scripts beside the state; the error of a copy may name the script alone."""
    problem = attempt(lambda: copy_scripts(folder))
    return None if problem is None else f"{problem} (while scripts were copied into {folder})"


def _publish(
    run_dir: Path, scratch: Path, final: Path, about: dict, keep: int, best_step: int | None
) -> None:
    """Manifest, sync, fence, rename, `latest`, removal of old ones, in this order; on rank 0 only."""
    files = {}
    for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
        durable.fsync(file)
        files[str(file.relative_to(scratch))] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    body = {**about, "files": files}
    durable.write_text(scratch / MANIFEST, json.dumps({**body, "digest": _digest(body)}, indent=1))
    for directory in [*(p for p in scratch.rglob("*") if p.is_dir()), scratch]:
        durable.fsync(directory)
    with locked(run_dir):
        newest = current_life(run_dir)
        if newest != about["life"]:
            raise UserError(
                f"{run_dir} {TAKEN_OVER} start number {newest}; this process is start number "
                f"{about['life']} and publishes nothing",
                "stop this process; the newer one goes on",
            )
        replaced = None
        if final.exists():
            replaced = final.with_name(f"{final.name}.replaced_{about['life']}")
            shutil.rmtree(replaced, ignore_errors=True)
            durable.rename(final, replaced)
        durable.rename(scratch, final)
        durable.fsync(final.parent)
        if replaced is not None:
            durable.remove(replaced)
        durable.write_atomic(final.parent / "latest", final.name)
        best = _mark_best(final.parent, best_step)
        _retain(final.parent, keep, best)


def _mark_best(folder: Path, step: int | None) -> str | None:
    """Lets the file `best` name the best checkpoint that there is; returns that name.

    A process that ended between its rename and this line left an older name in the file. What the run knows
    counts, or `_retain` would remove the best checkpoint.
    """
    file = folder / "best"
    name = file.read_text().strip() if file.is_file() else None
    known = f"step_{step}"
    if step is not None and name != known and (folder / known).is_dir():
        durable.write_atomic(file, known)
        return known
    return name


def _retain(folder: Path, keep: int, best: str | None) -> None:
    readable = [path for (life, _), path in _published(folder) if life != math.inf]
    for index, path in enumerate(readable):
        if index >= keep and path.name != best:
            durable.remove(path)


def _published(folder: Path) -> list[tuple[tuple[float, int], Path]]:
    """Returns ((life, step), path) of every published checkpoint, newest first.

    Those without a readable manifest lead, with an infinite life.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP_PATTERN.match(path.name)
        if match and path.is_dir():
            try:
                life = int(json.loads((path / MANIFEST).read_text())["life"])
            except (OSError, ValueError, KeyError, TypeError):
                life = math.inf
            found.append(((life, int(match.group(1))), path))
    return sorted(found, key=lambda item: item[0], reverse=True)


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _split(value, name: str, tensors: dict[str, Tensor]):
    """Turns nested state into JSON; its tensors move to `tensors` under dotted names."""
    if torch.is_tensor(value):
        tensors[name] = value.detach().cpu()
        return {TENSOR_KEY: name}
    if isinstance(value, dict):
        return {str(key): _split(child, f"{name}.{key}", tensors) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(child, f"{name}.{index}", tensors) for index, child in enumerate(value)]
    return value


def _join(value, tensors: dict[str, Tensor]):
    if isinstance(value, dict):
        return (
            tensors[value[TENSOR_KEY]]
            if set(value) == {TENSOR_KEY}
            else {key: _join(child, tensors) for key, child in value.items()}
        )
    return [_join(child, tensors) for child in value] if isinstance(value, list) else value
