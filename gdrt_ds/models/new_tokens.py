"""Adds tokens to a model, e.g. semantic ids: names in the tokenizer, rows of the embedding and of lm_head.

The result is an ordinary model folder in the run folder. Weight files that hold neither matrix are linked,
not copied. A new row is drawn around the mean of the old rows, with their standard deviation in every
dimension (seeded), so that new tokens start as likely as others and differ from each other.

Shapes: V rows of the embedding, n new tokens, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdrt_ds.errors import UserError
from gdrt_ds.files import set_usual_mode
from gdrt_ds.models.made_folder import make_once
from gdrt_ds.models.weight_files import WeightFiles

MARKER = "new_tokens.json"
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embedding")
HEADS = ("lm_head", "embed_out", "output")


def find_tokens(pattern: str, texts: Iterable[str]) -> list[str]:
    """Every different match of a regular expression in the texts, sorted.

    Raises:
        UserError: it is no regular expression, matches nothing, or matches an empty text.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"model.new_tokens = {pattern!r} is not a regular expression ({error})",
            "give one that matches a token, e.g. '<[a-z]_[0-9]+>'",
        ) from None
    found = {match.group(0) for text in texts for match in compiled.finditer(text)}
    if not found or "" in found:
        what = "matches nothing in the texts of the data"
        if found:
            what = "also matches an empty text"
        raise UserError(
            f"model.new_tokens = {pattern!r} {what}",
            "give a pattern of the tokens in your item texts (data.item_text), e.g. '<[a-z]_[0-9]+>'",
        )
    return sorted(found)


def with_new_tokens(source: Path, tokenizer, tokens: list[str], target: Path, seed: int) -> Path:
    """Writes the model of `source` with more tokens into `target`; nothing is done if it is there already.

    Args:
        source: a model folder. tokenizer: the one to extend; it is changed.
        tokens: those that the tokenizer has already keep their rows.
        seed: of the new rows.

    Raises:
        UserError: `target` holds something else, or the embedding is not found in the weight files.
    """
    from tokenizers import AddedToken

    recipe = {"tokens": _digest(tokens), "number": len(tokens), "seed": seed, "source": str(source)}
    vocabulary = tokenizer.get_vocab()
    new = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in new]
    other = UserError(
        f"{target} holds a base with other tokens (model.new_tokens, or the data have changed)",
        "give another run.dir",
    )
    try:
        return make_once(
            target, MARKER, recipe, lambda folder: _write(source, tokenizer, ids, folder, seed), other
        )
    except OSError as error:
        raise UserError(
            f"the base with new tokens cannot be written into {target} ({error})",
            "give a run.dir on a disk with room for the embedding, which is not there yet",
        ) from None


def _write(source: Path, tokenizer, ids: list[int], target: Path, seed: int) -> None:
    """Config, weights and tokenizer."""
    tensors = WeightFiles(source).tensors
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    texts = config.get("text_config") or config
    old = texts["vocab_size"]
    size = max(old, len(tokenizer))
    resized = {
        name
        for name, place in tensors.items()
        if name.endswith(".weight")
        and name.split(".")[-2] in (*EMBEDDINGS, *HEADS)
        and len(place.shape) == 2
        and place.shape[0] == old
    }
    biases = {
        name
        for name, place in tensors.items()
        if name.endswith(".bias") and name.split(".")[-2] in HEADS and place.shape == (old,)
    }
    # Tied weights are one tensor, and a folder may keep it under the head's name.
    tied = config.get("tie_word_embeddings", texts.get("tie_word_embeddings", False))
    wanted = (*EMBEDDINGS, *HEADS) if tied else EMBEDDINGS
    if not any(name.split(".")[-2] in wanted for name in resized):
        raise UserError(
            f"{source}: no embedding of {old} rows is found in its weight files",
            "add the tokens and rows yourself, save both as a model folder, and leave model.new_tokens away",
        )
    for file in sorted({place.file for place in tensors.values()}):
        held = (resized | biases) & {name for name, place in tensors.items() if place.file == file}
        if not held:
            (target / file.name).symlink_to(file.resolve())
            continue
        with safe_open(file, framework="pt") as stored:
            values = {name: stored.get_tensor(name) for name in stored.keys()}
            metadata = stored.metadata() or {"format": "pt"}
        for name in held:
            values[name] = _with_rows(values[name], ids, size, seed)
        save_file(values, target / file.name, metadata)
        set_usual_mode(target / file.name)
    for part in {id(texts): texts, id(config): config}.values():
        if part.get("vocab_size") == old:
            part["vocab_size"] = size
    for file in source.iterdir():
        copied = file.is_file() and file.suffix in (".json", ".py", ".jinja") and file.name != MARKER
        if copied:
            shutil.copy(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer.save_pretrained(target)


def _with_rows(weight_VH: Tensor, ids: list[int], size: int, seed: int) -> Tensor:
    """[size, H]: the old rows, and a row for every new id. A bias [V] gets its mean for each."""
    if weight_VH.dim() == 1:
        longer = weight_VH.new_zeros(size)
        longer[: len(weight_VH)] = weight_VH
        longer[torch.tensor(ids, dtype=torch.long)] = weight_VH.float().mean().to(longer.dtype)
        return longer
    rows_VH = weight_VH.float()
    generator = torch.Generator().manual_seed(seed)
    noise_nH = torch.randn(len(ids), rows_VH.shape[1], generator=generator)
    fresh_nH = rows_VH.mean(0) + rows_VH.std(0) * noise_nH
    found = weight_VH.new_zeros(size, weight_VH.shape[1])
    found[: len(weight_VH)] = weight_VH
    found[torch.tensor(ids, dtype=torch.long)] = fresh_nH.to(found.dtype)
    return found


def _digest(tokens: list[str]) -> str:
    return hashlib.sha256("\0".join(tokens).encode("utf-8")).hexdigest()
