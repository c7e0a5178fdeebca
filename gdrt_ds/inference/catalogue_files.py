"""The catalogue beside an exported model: its titles, its token trie and the prompt, in documented files.

A server that knows nothing of this package needs them to recommend as evaluation did: `catalogue.jsonl` (the
titles), `catalogue_trie.safetensors` (which tokens may follow which, docs/file-formats.md) and `prompt.json`
(how a history is asked).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gdrt_ds.config import ModelSection
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.prompts import PromptEncoder
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.data.trie_file import TRIE_FILE, save_trie
from gdrt_ds.models.source import load_tokenizer


def write_catalogue(run: Path, folder: Path, section: ModelSection) -> str:
    """Writes catalogue, trie and prompt of a run beside an exported model, as far as the run has them.

    A run on rows of prompt and completion has a prompt and no catalogue.

    Args:
        run: the run folder.
        folder: the exported model, with its tokenizer.
        section: settings of the model.

    Returns:
        what was written of the catalogue, in words.
    """
    missing = []
    for name in ("catalogue.jsonl", "prompt.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
        else:
            missing.append(name)
    if missing:
        return f"no catalogue: the run has no {' and no '.join(missing)}"
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
