"""The catalogue beside an exported model: its titles, its token trie and the prompt, in documented files.

A server that knows nothing of this package needs them to recommend as evaluation did: `catalogue.jsonl` (the
titles), `catalogue_trie.safetensors` (which tokens may follow which, docs/file-formats.md) and `prompt.json`
(how a history is asked).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gdrt_ds.config import ModelSection
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.prompts import PromptEncoder
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.errors import UserError
from gdrt_ds.models.source import load_tokenizer

TRIE_FILE = "catalogue_trie.safetensors"
FORMAT = "1"
ARRAYS = ("token", "parent", "depth", "end", "entry")


def write_catalogue(run: Path, folder: Path, section: ModelSection) -> str:
    """Writes catalogue, trie and prompt of a run beside an exported model; says what was written.

    Args:
        run: the run folder.
        folder: the exported model, with its tokenizer.
        section: settings of the model.
    """
    missing = [name for name in ("catalogue.jsonl", "prompt.json") if not (run / name).is_file()]
    if missing:
        return f"no catalogue: the run has no {' and no '.join(missing)}"
    for name in ("catalogue.jsonl", "prompt.json"):
        shutil.copyfile(run / name, folder / name)
    catalogue = Catalogue.load(run / "catalogue.jsonl")
    tokenizer = load_tokenizer(folder, trust_remote_code=section.trust_remote_code)
    trie = catalogue_trie(catalogue, PromptTemplate.load(run / "prompt.json"), tokenizer)
    save_trie(trie, folder / TRIE_FILE)
    return f"catalogue of {len(catalogue):,} titles, its trie has {trie.num_nodes:,} nodes"


def catalogue_trie(catalogue: Catalogue, template: PromptTemplate, tokenizer) -> TokenTrie:
    """Returns the trie of the titles as a model answers them: formatted, with the token that ends them."""
    # Titles do not depend on the prompt, so its length is no matter here.
    encoder = PromptEncoder(template, tokenizer, max_length=1 << 30)
    titles = [entry.text for entry in catalogue.entries]
    encoder.warm(titles)
    return TokenTrie.build([encoder.target_ids(title) for title in titles], titles)


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
