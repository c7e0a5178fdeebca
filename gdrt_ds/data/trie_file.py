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

TRIE_FILE = "catalogue_trie.safetensors"
FORMAT = "1"
ARRAYS = ("token", "parent", "depth", "end", "entry")


def save_trie(trie: TokenTrie, path: Path) -> None:
    """Writes the arrays of a trie (docs/file-formats.md)."""
    arrays = {name: np.ascontiguousarray(getattr(trie, name), dtype=np.int32) for name in ARRAYS}
    save_file(arrays, str(path), metadata={"format": FORMAT})


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
