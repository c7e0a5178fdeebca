"""A catalogue's trie as a file: catalogue_trie.safetensors beside an exported model (docs/file-formats.md).

A server reads it without torch, tokenizer or settings.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.files import set_usual_mode

TRIE_FILE = "catalogue_trie.safetensors"
FORMAT = "1"
ARRAYS = ("token", "parent", "depth", "end", "entry")
LIMITS = ("max_length", "history_length")
"""What the file's metadata says of prompts: tokens of a whole example, and titles of a history."""


def save_trie(trie: TokenTrie, path: Path, limits: dict[str, int] | None = None) -> None:
    """Writes the arrays of a trie (docs/file-formats.md), and the `LIMITS` of prompts beside them."""
    arrays = {name: np.ascontiguousarray(getattr(trie, name), dtype=np.int32) for name in ARRAYS}
    metadata = {name: str(value) for name, value in (limits or {}).items()}
    save_file(arrays, str(path), metadata={"format": FORMAT, **metadata})
    set_usual_mode(path)


def load_limits(folder: str | Path) -> tuple[int, int]:
    """Reads (max_length, history_length) of the prompts of an exported model.

    Raises:
        UserError: there is no such file, or it was written by a version that did not write them.
    """
    path = Path(folder) / TRIE_FILE
    fix = (
        "export the run again (gdrt-export), or take prompt.max_length and data.history_length of its config"
    )
    try:
        with safe_open(str(path), "np") as stored:
            metadata = stored.metadata() or {}
        max_length, history_length = (int(metadata[name]) for name in LIMITS)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not say how long prompts are ({error!r})", fix) from None
    return max_length, history_length


def load_trie(folder: str | Path) -> TokenTrie:
    """Reads the trie of an exported model.

    Args:
        folder: the exported model, or the file itself.

    Raises:
        UserError: there is no such file, or it is not a trie of this format.
    """
    path = Path(folder)
    if path.is_dir():
        path = path / TRIE_FILE
    fix = "export the run again (gdrt-export); the file stands beside the exported model"
    if not path.is_file():
        raise UserError(f"{path} does not exist", fix)
    try:
        with safe_open(str(path), "np") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error})", fix) from None
    if metadata.get("format") != FORMAT or set(arrays) != set(ARRAYS):
        raise UserError(
            f"{path} holds {', '.join(sorted(arrays))} in format {metadata.get('format')}, and a trie of "
            f"format {FORMAT} holds {', '.join(ARRAYS)}",
            fix,
        )
    _check_arrays(arrays, path, fix)
    return TokenTrie(*(arrays[name] for name in ARRAYS))


def _check_arrays(arrays: dict[str, np.ndarray], path: Path, fix: str) -> None:
    """Raises UserError if the arrays are not those of one tree in depth-first order."""
    nodes = len(arrays["token"])
    ids = np.arange(nodes)
    sound = (
        all(array.dtype == np.int32 and array.shape == (nodes,) for array in arrays.values())
        and nodes > 1
        and arrays["parent"][0] == -1
        and bool((arrays["parent"][1:] >= 0).all())
        and bool((arrays["parent"] < ids).all())
        and bool((arrays["depth"][1:] == arrays["depth"][arrays["parent"][1:]] + 1).all())
        and bool((arrays["end"] > ids).all() and (arrays["end"] <= nodes).all())
        and bool((arrays["token"][1:] >= 0).all())
    )
    if not sound:
        raise UserError(f"{path} holds arrays that are no tree", fix)
