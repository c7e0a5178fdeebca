"""Reads the settings of a run: a YAML file and `key.sub=value` overrides, checked before anything is loaded.

Unknown keys are errors that name the nearest key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gdrt_ds.config.explaining import fields_of, refuse
from gdrt_ds.config.sections import RunConfig
from gdrt_ds.config.yaml_files import PlainLoader, read_yaml
from gdrt_ds.errors import UserError
from gdrt_ds.files import no_such_preset, preset_path


def known_keys() -> list[str]:
    """All dotted keys of the tree, e.g. `dro.tau`."""
    return list(fields_of())


def _is_text(key: str) -> bool:
    """Whether the setting is text, or empty, and nothing else."""
    field = fields_of().get(key)
    return field is not None and field.annotation in (str, str | None)


def _text(text: str) -> str | None:
    """The value of a setting that is text: what stands there, without quotes around all of it.

    YAML would cut it at ` #`, and read digits, dates, brackets and `on` as something else.
    """
    plain = text.strip()
    if plain in ("", "~", "null", "Null", "NULL"):
        return None
    if len(plain) > 1 and plain[0] == plain[-1] and plain[0] in "'\"":
        return str(yaml.safe_load(plain))
    return text


def _set_dotted(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key:
        raise UserError(
            f"override `{override}` is not of the form key.sub=value", "write for example dro.tau=0.5"
        )
    try:
        value = _text(text) if _is_text(key) else yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise UserError(
            f"override `{override}`: the value is not valid YAML ({error})", "quote the value"
        ) from None
    if isinstance(value, str) and not _is_text(key):
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
        if child is None:  # a section whose keys are all commented out
            child = node[part] = {}
        if not isinstance(child, dict):
            raise UserError(
                f"override `{override}`: `{'.'.join(parents[: depth + 1])}` is a value, not a section",
                f"known keys start with {', '.join(RunConfig.model_fields)}",
            )
        node = child
    node[leaf] = value


def _with_empty_sections(tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A section whose keys are all commented out is an empty one, at every level."""
    found = dict(tree)
    for name, field in model.model_fields.items():
        section = field.annotation
        if name in found and isinstance(section, type) and issubclass(section, BaseModel):
            value = {} if found[name] is None else found[name]
            found[name] = _with_empty_sections(value, section) if isinstance(value, dict) else value
    return found


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML run config and applies overrides.

    Args:
        path: the user's file, or a shipped one (`configs/smoke.yaml`), which is found from any folder.

    Raises:
        UserError: missing file, not YAML, unknown key (with the nearest name), wrong type or value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        file = preset_path(path)
        if not file.is_file():
            raise no_such_preset("--config", path, "configs", ".yaml")
        tree = read_yaml(file, f"--config {path}") or {}
        if not isinstance(tree, dict):
            raise UserError(
                f"--config {path}: expected a mapping of sections, found {type(tree).__name__}",
                "see configs/smoke.yaml",
            )
        tree = _with_empty_sections(tree, RunConfig)
    for override in overrides:
        _set_dotted(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        given = [override.partition("=")[0] for override in overrides]
        raise refuse(error.errors(), tree, str(path or "config"), given) from None


def dump_config(config: RunConfig) -> str:
    """The resolved, complete, reloadable YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
