"""Reads the settings of a run: a YAML file and `key.sub=value` overrides, checked before anything is loaded.

Unknown keys are errors that name the nearest key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gdrt_ds.config.sections import RunConfig
from gdrt_ds.errors import UserError


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the tree, e.g. `dro.tau`."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _describe(error: Mapping[str, Any], origin: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(combination)"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        leaf = difflib.get_close_matches(
            key.split(".")[-1], [k.split(".")[-1] for k in known_keys()], n=1, cutoff=0.6
        )
        same_leaf = [k for k in known_keys() if leaf and k.split(".")[-1] == leaf[0]]
        hint = near[0] if near else (same_leaf[0] if same_leaf else None)
        return f"{origin}: unknown key `{key}`" + (f"; did you mean `{hint}`?" if hint else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{origin}: {key} = {error['input']!r}: {message}" if error["loc"] else f"{origin}: {message}"


def _set_dotted(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(
            f"override `{override}` is not of the form key.sub=value", "write for example dro.tau=0.5"
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"override `{override}`: the value is not valid YAML ({error})", "quote the value"
        ) from None
    if isinstance(value, str):
        try:
            value = (
                float(value) if "e" in value.lower() and not value.lower().startswith(("e", "inf")) else value
            )
        except ValueError:
            pass
    node = tree
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override `{override}`: `{'.'.join(parents[: depth + 1])}` is a value, not a section",
                f"known keys start with {', '.join(RunConfig.model_fields)}",
            )
        node = child
    node[leaf] = value


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML run config and applies overrides.

    Raises:
        UserError: missing file, not YAML, unknown key (with the nearest name), wrong type or value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise UserError(
                f"--config {path}: no such file",
                "the shipped configs are in configs/, e.g. configs/smoke.yaml",
            )
        try:
            tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise UserError(
                f"--config {path}: not valid YAML: {error}", "check the indentation at that line"
            ) from None
        if not isinstance(tree, dict):
            raise UserError(
                f"--config {path}: expected a mapping of sections, found {type(tree).__name__}",
                "see configs/smoke.yaml",
            )
    for override in overrides:
        _set_dotted(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(e, str(path or "config")) for e in error.errors()]
        raise UserError(
            "; ".join(dict.fromkeys(lines)),
            "docs/config-reference.md lists every key with its meaning, its allowed values and its default",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved, complete, reloadable YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
