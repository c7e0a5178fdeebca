"""What a published card says in place of paths: their last part, or the name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdrt_ds.config import RunConfig
from gdrt_ds.data.readers._hub import HUB_NAME
from gdrt_ds.inference.model_card import read_json

PATHS_OR_HUB = (
    ("data", "path"),
    ("data", "items"),
    ("data", "users"),
    ("model", "path"),
    ("model", "tokenizer"),
)
"""Settings that may be a path or a name on the hub."""

PATHS = (
    ("run", "dir"),
    ("data", "train_file"),
    ("prompt", "template"),
    ("groups", "reference_adapter"),
    ("dro", "frozen_weights"),
    ("deepspeed",),
    ("resume",),
)
"""Settings that may be a path of the machine, or a word without a slash, which stays."""


def public_settings(config: RunConfig, run: Path) -> dict[str, Any]:
    """Returns a run's settings in which every path is cut to its last part.

    Args:
        run: the run folder.
    """
    settings = _without_plain_paths(config.model_dump(mode="json"))
    for *sections, name in (*PATHS_OR_HUB, *PATHS):
        section = settings
        for part in sections:
            section = section[part]
        value = section.get(name)
        if isinstance(value, str):
            own = (*sections, name) in PATHS
            section[name] = (Path(value).name or value) if own else public_path(value, run, config)
    mixture: dict[str, Any] = {}
    for path, weight in config.data.mixture.items():
        short = public_path(path, run, config)
        same = sum(key.partition(" (")[0] == short for key in mixture)
        mixture[f"{short} ({same + 1})" if same else short] = weight
    settings["data"]["mixture"] = mixture
    return settings


def public_path(path: str, run: Path, config: RunConfig) -> str:
    """The last part of a path; a name of the hub and any other name stay as they are.

    `owner/name` is taken for a name of the hub unless such a path is known here: there is one beside the
    run's own folder, from where training was started, or the adapter says that its base lay there.
    """
    if HUB_NAME.fullmatch(path) and not path.startswith(".") and not _is_path(path, run, config):
        return path
    return Path(path).name or path


def _is_path(path: str, run: Path, config: RunConfig) -> bool:
    """Whether `owner/name` is a path on the machine that the run was made on, as far as that is known."""
    if Path(path).suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".gz", ".dat"):
        return True
    base = str(read_json(run / "adapter" / "adapter_config.json").get("base_model_name_or_path"))
    if Path(base).is_absolute() and Path(base).parts[-2:] == Path(path).parts:
        return True
    folders = [Path.cwd()]
    own = Path(config.run.dir)
    if not own.is_absolute():
        folders += list(run.resolve().parents)[len(own.parts) - 1 :][:1]
    return any((folder / path).exists() for folder in folders)


def _without_plain_paths(value: Any) -> Any:
    """Settings in which whatever can only be a path is cut, wherever it stands."""
    if isinstance(value, dict):
        return {key: _without_plain_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_plain_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~/", "./", "../")):
        return Path(value).name or value
    return value
