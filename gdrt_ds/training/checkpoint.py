"""Checkpoints that are published whole or not at all, and the adapter folder.

RUN/checkpoints/step_N/ holds
    rank_00000.safetensors ...  this rank's slices of float32 weights and optimizer state, and its random generators
    state.json, client.safetensors  counters, schedule, the trainer's own state (DRO weights, data position)
    deepspeed/                  DeepSpeed's own files (for its tools, e.g. zero_to_fp32; never read here, they are pickles)
    manifest.json               step, world size, life, fingerprint of the frozen base, size and sha256 of every file
A save writes into a temporary folder, syncs it, and rank 0 renames it; then `latest` follows, atomically. `find_latest_valid`
trusts manifests only. Every start of a run has a life number (RUN/life): an older process that wakes up late cannot publish.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdrt_ds.errors import StorageError, UserError
from gdrt_ds.training.engine_state import export_rng, export_state, import_rng, import_state

MANIFEST, FORMAT = "manifest.json", 1
STEP_PATTERN = re.compile(r"^step_(\d+)(\.replaced_\d+)?$")
TENSOR_KEY = "__tensor__"
TAKEN_OVER = "was taken over by"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Restored:
    """What `load` gives back beside the engine's state: the trainer's own, and where it came from."""

    step: int
    client_state: dict[str, Any]
    world: int
    same_world: bool
    path: Path


def begin_life(run_dir: str | Path) -> int:
    """Counts this start in RUN/life; call on rank 0 and broadcast. Leftovers of killed saves are removed."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir):
        life = current_life(run_dir) + 1
        _write_atomic(run_dir / "life", json.dumps({"life": life}))
    folder = run_dir / "checkpoints"
    if folder.is_dir():
        for leftover in folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
    return life


def current_life(run_dir: str | Path) -> int:
    """Newest life of a run folder, 0 if it never started."""
    path = Path(run_dir) / "life"
    return json.loads(path.read_text())["life"] if path.is_file() else 0


def save(
    engine,
    run_dir: str | Path,
    step: int,
    client_state: dict[str, Any],
    *,
    life: int,
    fingerprint: str,
    keep: int = 2,
    best: bool = False,
    deepspeed_files: bool = True,
) -> Path:
    """Publishes RUN/checkpoints/step_<step>; every rank calls it.

    Args:
        client_state: nested dicts and lists of JSON values and tensors, the same on every rank.
        life: what `begin_life` returned for this start.
        fingerprint: of the frozen base (`LoadedModel.fingerprint`), compared at resume.
        keep: newest checkpoints that stay; the best one stays beside them.
        best: this is the best so far by validation.
    Raises:
        UserError: on every rank, if any rank could not write (disk full) or a newer life owns the run. The checkpoints
            published before are untouched and the temporary folder is removed.
    """
    folder = Path(run_dir) / "checkpoints"
    final, scratch = folder / f"step_{step}", folder / f".step_{step}.life_{life}"
    rank, world = _rank(), _world()
    problem = _attempt(lambda: _prepare(scratch), on=rank == 0)
    _agree(engine, problem, scratch)
    problem = _attempt(lambda: _write_own(engine, scratch, rank, step, client_state))
    _agree(engine, problem, scratch)
    if deepspeed_files:
        _agree(engine, _write_deepspeed_files(engine, scratch), scratch)
    about = {
        "format": FORMAT,
        "step": step,
        "world": world,
        "life": life,
        "fingerprint": fingerprint,
        "stage": engine.zero_optimization_stage(),
    }
    problem = _attempt(lambda: _publish(Path(run_dir), scratch, final, about, keep, best), on=rank == 0)
    _agree(engine, problem, scratch)
    return final


def find_latest_valid(run_dir: str | Path, notes: list[str] | None = None) -> Path | None:
    """The newest checkpoint whose files all match its manifest; newest by (life, step). `notes` collects what was passed over."""
    for _, path in _published(Path(run_dir) / "checkpoints"):
        problem = verify(path)
        if problem is None:
            return path
        if notes is not None:
            notes.append(f"{path.name} is passed over: {problem}")
    return None


def resolve_resume(run_dir: str | Path, resume: str | None, notes: list[str] | None = None) -> Path | None:
    """The folder that `resume` means: null = none, auto = the newest valid one if any, a path = that one.

    Raises:
        UserError: an explicit path that is missing or damaged.
    """
    if resume is None:
        return None
    if resume == "auto":
        return find_latest_valid(run_dir, notes)
    path = Path(resume)
    if not path.is_dir() and (Path(run_dir) / "checkpoints" / resume).is_dir():
        path = Path(run_dir) / "checkpoints" / resume
    if not path.is_dir():
        known = ", ".join(p.name for _, p in _published(Path(run_dir) / "checkpoints")) or "none"
        raise UserError(
            f"resume = {resume}: no such checkpoint folder",
            f"checkpoints of {run_dir}: {known}; or resume=auto",
        )
    problem = verify(path)
    if problem is not None:
        raise UserError(
            f"resume = {resume}: the checkpoint is damaged ({problem})",
            "resume=auto takes the newest valid one",
        )
    return path


def verify(path: Path) -> str | None:
    """None if every file matches the manifest, else the first difference in words."""
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
            if _sha256(file) != entry["sha256"]:
                return f"{name} differs from its checksum"
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest is not readable ({error})"
    return None


def load(engine, path: str | Path, *, fingerprint: str | None = None, restore_rng: bool = True) -> Restored:
    """Puts a checkpoint into a fresh engine; every rank calls it with the same path (verified before: `resolve_resume`).

    On the world size of the checkpoint the state is restored to the bit; on another one the slices are cut anew and
    the random generators are left as they are (the run then differs from the straight one by dropout masks and rounding).

    Raises:
        UserError: another frozen base, other LoRA settings, another optimizer.
    """
    path = Path(path)
    manifest = json.loads((path / MANIFEST).read_text())
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{path.name} was trained on another frozen base (fingerprint {manifest['fingerprint'][:12]}, model.path now has "
            f"{fingerprint[:12]})",
            "restore model.path and its quantisation settings, or start a new run folder",
        )
    same_world = manifest["world"] == _world()
    slices: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    rng: dict[str, Tensor] = {}
    for rank in range(manifest["world"]):
        for name, value in load_file(path / f"rank_{rank:05d}.safetensors").items():
            if name.startswith("rng."):
                if rank == _rank():
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


def save_adapter(engine, folder: str | Path, *, tokenizer=None) -> Path:
    """Writes the adapter as PEFT does (safetensors + adapter_config.json + tokenizer); every rank calls it.

    Sharded parameters are gathered one by one; the file is read back and compared, because empty adapters saved under
    ZeRO-3 are the field's classic loss (trl #4416, peft #453, #2500).

    Raises:
        UserError: on every rank, if the folder cannot be written or the adapter is empty after training steps.
    """
    import deepspeed
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.tmp")
    model = next(m for m in engine.module.modules() if isinstance(m, PeftModel))
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if _rank() == 0:
                    gathered[name] = parameter.detach().to("cpu", copy=True).contiguous()

    def write():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors = get_peft_model_state_dict(
            model, state_dict=gathered, adapter_name="default", save_embedding_layers=False
        )
        if len(tensors) != len(gathered):
            raise RuntimeError(f"{len(gathered)} trainable tensors, {len(tensors)} recognised by PEFT")
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            scratch / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        _fsync(scratch / "adapter_model.safetensors")
        adapter_config = copy.deepcopy(model.peft_config["default"])
        adapter_config.inference_mode = True
        adapter_config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        again = load_file(scratch / "adapter_model.safetensors")
        if set(again) != set(tensors) or any(not torch.equal(again[name], tensors[name]) for name in tensors):
            raise RuntimeError("the file read back differs from the adapter")
        empty = [name for name, value in again.items() if "lora_B" in name and not value.any()]
        if empty and engine.global_steps > engine.skipped_steps:
            raise RuntimeError(
                f"{len(empty)} adapter matrices are still zero after {engine.global_steps} steps, e.g. {empty[0]}"
            )
        if folder.exists():
            _remove(folder)
        _rename(scratch, folder)
        _fsync(folder.parent)

    _agree(engine, _attempt(write, on=_rank() == 0), scratch, what="adapter")
    return folder


# ---------------------------------------------------------------------------------------------------- writing


def _prepare(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _write_own(engine, scratch: Path, rank: int, step: int, client_state: dict) -> None:
    slices, common = export_state(engine)
    _save_tensors({**slices, **export_rng()}, scratch / f"rank_{rank:05d}.safetensors")
    if rank == 0:
        tensors: dict[str, Tensor] = {}
        plain = _split(client_state, "client", tensors)
        if tensors:
            _save_tensors(tensors, scratch / "client.safetensors")
        _write_text(scratch / "state.json", json.dumps({"step": step, "engine": common, "client": plain}))


def _write_deepspeed_files(engine, scratch: Path) -> str | None:
    """DeepSpeed's save with its writes guarded: a rank whose disk is full must still reach DeepSpeed's barriers."""
    problems: list[str] = []
    writer = engine.checkpoint_engine
    original = writer.save

    def guarded(state_dict, path, *args, **kwargs):
        problem = _attempt(lambda: original(state_dict, path, *args, **kwargs))
        if problem:
            problems.append(problem)

    writer.save = guarded
    try:
        engine.save_checkpoint(
            str(scratch), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True
        )
    finally:
        del writer.save
    return problems[0] if problems else None


def _publish(run_dir: Path, scratch: Path, final: Path, about: dict, keep: int, best: bool) -> None:
    """Rank 0 only: manifest, sync, fence, rename, `latest`, retention."""
    files = {}
    for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
        _fsync(file)
        files[str(file.relative_to(scratch))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    body = {**about, "files": files}
    _write_text(scratch / MANIFEST, json.dumps({**body, "digest": _digest(body)}, indent=1))
    for directory in [*(p for p in scratch.rglob("*") if p.is_dir()), scratch]:
        _fsync(directory)
    with _locked(run_dir):
        newest = current_life(run_dir)
        if newest != about["life"]:
            raise UserError(
                f"{run_dir} {TAKEN_OVER} start number {newest}; this process is start number {about['life']} and publishes nothing",
                "stop this process; the newer one goes on",
            )
        replaced = None
        if final.exists():
            replaced = final.with_name(f"{final.name}.replaced_{about['life']}")
            shutil.rmtree(replaced, ignore_errors=True)
            _rename(final, replaced)
        _rename(scratch, final)
        _fsync(final.parent)
        if replaced is not None:
            _remove(replaced)
        _write_atomic(final.parent / "latest", final.name)
        if best:
            _write_atomic(final.parent / "best", final.name)
        _retain(final.parent, keep)


def _retain(folder: Path, keep: int) -> None:
    best = (folder / "best").read_text().strip() if (folder / "best").is_file() else None
    readable = [path for (life, _), path in _published(folder) if life != math.inf]
    for index, path in enumerate(readable):
        if index >= keep and path.name != best:
            _remove(path)


def _published(folder: Path) -> list[tuple[tuple[float, int], Path]]:
    """((life, step), path) of every published checkpoint, newest first; those without a readable manifest lead, with life inf."""
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


def _remove(path: Path) -> None:
    """Out of sight first, so that a half-removed folder is never taken for a checkpoint."""
    hidden = path.with_name(f".removed_{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    _rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- agreement of ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _attempt(action, on: bool = True) -> str | None:
    """Runs the action; a failed write comes back as words instead of leaving the other ranks in a collective."""
    if not on:
        return None
    try:
        action()
    except UserError as error:
        return error.problem
    except WRITE_ERRORS as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}"
    return None


def _agree(engine, problem: str | None, scratch: Path, what: str | None = None) -> None:
    """Raises on every rank if any rank has a problem; also the barrier between the phases of a save."""
    failed = problem is not None
    if _world() > 1:
        flag = torch.tensor([float(failed)], device=engine.device)
        dist.all_reduce(flag)
        failed = bool(flag.item() > 0)
    if not failed:
        return
    texts = [problem]
    if _world() > 1:
        texts = [None] * _world()
        dist.all_gather_object(texts, problem)
    if _rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    which = next(rank for rank, text in enumerate(texts) if text)
    mistake = TAKEN_OVER in texts[which] or (what is not None and texts[which].startswith("RuntimeError"))
    kind = UserError if mistake else StorageError
    raise kind(
        f"{what or 'checkpoint ' + scratch.name.split('.')[1]} was not published: rank {which}: {texts[which]}",
        "free disk space (or stop the other process on this run folder) and go on with resume=auto; earlier checkpoints are intact",
    )


# ---------------------------------------------------------------------------------------------------- files


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    _fsync(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _write_atomic(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    _write_text(scratch, text)
    _rename(scratch, path)
    _fsync(path.parent)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(run_dir: Path):
    with open(run_dir / ".life.lock", "a") as handle:  # the kernel lets go of it when a process dies
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _split(value, name: str, tensors: dict[str, Tensor]):
    """Nested state -> JSON, its tensors moved to `tensors` under dotted names."""
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
