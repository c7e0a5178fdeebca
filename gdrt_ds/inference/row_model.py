"""Opens a run that was trained on rows of prompt and completion, for scoring.

Such a run has no catalogue.jsonl; its prompt.json has the style `rows`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdrt_ds.config import RunConfig, load_config
from gdrt_ds.data.row_prompts import STYLE, RowEncoder, saved_pieces
from gdrt_ds.errors import UserError
from gdrt_ds.inference.recommender import base_path, in_dtype_of_training, load_checked, ready_to_score
from gdrt_ds.models.load import LoadedModel


@dataclass
class RowModel:
    """A model and the encoder of its prompts.

    Attributes:
        adapter: its folder, None for a plain base model.
        lines: what was loaded and how.
    """

    config: RunConfig
    loaded: LoadedModel
    encoder: RowEncoder
    adapter: Path | None = None
    lines: list[str] = field(default_factory=list)


def is_row_run(folder: str | Path) -> bool:
    """Whether a run folder is of rows of prompt and completion."""
    return _saved_prompt(Path(folder)).get("style") == STYLE


def _saved_prompt(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def open_row_run(
    folder: str | Path, runtime: Any, overrides: list[str], *, base: bool = False, merge: bool = True
) -> RowModel:
    """A run folder, ready to score.

    Args:
        overrides: `key.sub=value`, e.g. model.dtype=float32.
        base: leave the adapter out.

    Raises:
        UserError: an incomplete folder, or any refusal of gdrt_ds.inference.recommender.
    """
    folder = Path(folder)
    adapter = folder / "adapter"
    has_adapter = (adapter / "adapter_config.json").is_file()
    if not base and not has_adapter:
        raise UserError(
            f"run folder {folder} has no adapter yet",
            "wait for the training to end, or evaluate the base model (--base)",
        )
    config, as_loaded = in_dtype_of_training(folder, runtime, overrides, _read_config)
    path = base_path(config.model, adapter if has_adapter else None, folder / "base")
    pieces = saved_pieces(_saved_prompt(folder))
    return open_row_model(config, runtime, path, None if base else adapter, pieces, merge, as_loaded)


def _read_config(folder: Path, overrides: list[str]) -> RunConfig:
    return load_config(folder / "config.yaml", overrides)


def open_row_model(
    config: RunConfig,
    runtime: Any,
    path: Path,
    adapter: Path | None,
    pieces: dict[tuple[str, ...], list[str]] | None = None,
    merge: bool = True,
    as_loaded: bool = False,
) -> RowModel:
    """Loads base and adapter; the scores are computed in float32 where it fits, unless `as_loaded`.

    Raises:
        UserError: whatever cannot be loaded.
    """
    loaded, lines = load_checked(config, runtime, path, adapter)
    loaded, _, said = ready_to_score(loaded, config, runtime, adapter, merge, as_loaded)
    encoder = RowEncoder(config.prompt, loaded.tokenizer, pieces)
    return RowModel(config, loaded, encoder, adapter, [*lines, *said])
