"""The catalogue beside an exported model: its titles, its token trie and the prompt, in documented files.

A server that knows nothing of this package needs them to recommend as evaluation did: `catalogue.jsonl` (the
titles), `catalogue_trie.safetensors` (which tokens may follow which, and how long a prompt may be) and
`prompt.json` (how a history is asked). docs/file-formats.md describes them; `ExportedPrompts` follows them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gdrt_ds.config import RunConfig
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.prompts import PromptEncoder
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.data.trie_file import TRIE_FILE, load_limits, save_trie
from gdrt_ds.models.source import load_tokenizer


class ExportedPrompts:
    """The prompts of an exported model, token by token those of its training and evaluation.

    Args:
        folder: the exported model.
        tokenizer: its tokenizer, of transformers.

    Raises:
        UserError: the folder has no catalogue, trie or prompt, or was written by an earlier version.
    """

    def __init__(self, folder: str | Path, tokenizer):
        max_length, self.history_length = load_limits(folder)
        template = PromptTemplate.load(Path(folder) / "prompt.json")
        self.encoder = PromptEncoder(template, tokenizer, max_length)
        self.encoder.reserve_for(Catalogue.load(Path(folder) / "catalogue.jsonl"))

    def ids(self, titles: list[str]) -> list[int]:
        """Tokens of the prompt for a history of titles, oldest first; the newest that fit are in it."""
        return self.encoder.encode_newest(titles, self.history_length).input_ids.tolist()


def write_catalogue(run: Path, folder: Path, config: RunConfig) -> str:
    """Writes catalogue, trie and prompt of a run beside an exported model, as far as the run has them.

    A run on rows of prompt and completion has a prompt and no catalogue.

    Args:
        run: the run folder.
        folder: the exported model, with its tokenizer.
        config: settings of the run.

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
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    trie = catalogue_trie(catalogue, PromptTemplate.load(run / "prompt.json"), tokenizer)
    limits = {"max_length": config.prompt.max_length, "history_length": config.data.history_length}
    save_trie(trie, folder / TRIE_FILE, limits)
    return f"catalogue of {len(catalogue):,} titles, its trie has {trie.num_nodes:,} nodes"


def catalogue_trie(catalogue: Catalogue, template: PromptTemplate, tokenizer) -> TokenTrie:
    """Returns the trie of the titles as a model answers them: formatted, with the token that ends them."""
    # Titles do not depend on the prompt, so its length is no matter here.
    encoder = PromptEncoder(template, tokenizer, max_length=1 << 30)
    titles = [entry.text for entry in catalogue.entries]
    encoder.warm(titles)
    return TokenTrie.build([encoder.target_ids(title) for title in titles], titles)
