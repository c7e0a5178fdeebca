"""Where a model comes from: `model.path` becomes a local folder, whose config and tokenizer are read here.

No weight is loaded in this file. Everything that can be wrong with a folder, a hub name or a tokenizer is
refused here with words, before any rank spends time on weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gdrt_ds.config import ModelSection, TinySection
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import SMOLLM2_NAME, TINY_NAME, make_tiny_model, smollm2_folder
from gdrt_ds.models.new_tokens import MARKER as NEW_TOKENS_MARKER
from gdrt_ds.models.stored_four_bit import stored_four_bit
from gdrt_ds.runtime.cpu_products import bfloat16_products

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
FIRST_BFLOAT16 = 8
"""Major number of the compute capability (Ampere) from which GPUs compute in bfloat16."""


def resolve_model(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tiny_folder: str | Path | None = None,
    texts: list[str] | None = None,
    seed: int = 0,
    tiny: TinySection | None = None,
) -> Path:
    """Returns the local folder of a model.

    Args:
        path: a folder, a hub name, `smollm2-135m` or `tiny-random`.
        revision: branch, tag or commit on the hub.
        trust_remote_code: also downloads the Python files of a hub model.
        tiny_folder: where `tiny-random` is made.
        texts: the texts that the tokenizer of `tiny-random` is made of.
        seed: seed of the weights of `tiny-random`.
        tiny: sizes of `tiny-random`. None: the defaults.

    Raises:
        UserError: there is nothing at this path, or the hub cannot be reached.
    """
    if path == SMOLLM2_NAME:
        return smollm2_folder()
    if path == TINY_NAME:
        if tiny_folder is None or not texts:
            raise UserError(
                f"model.path = {TINY_NAME} needs the texts of a corpus and a folder",
                "give model.path a folder here",
            )
        sizes = tiny or TinySection()
        return make_tiny_model(
            tiny_folder,
            texts,
            seed,
            num_layers=sizes.layers,
            hidden=sizes.hidden,
            num_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            intermediate=sizes.intermediate,
            std=sizes.std,
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_model_folder(path, folder)
        return folder.resolve()
    if folder.exists():
        raise UserError(
            f"model.path = {path} is a file", "give the folder that holds config.json and the safetensors"
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path = {path}: no such folder",
            f"give a folder, a hub name (owner/name), {SMOLLM2_NAME} or {TINY_NAME}",
        )
    return _download(path, revision, trust_remote_code)


def _check_model_folder(path: str, folder: Path) -> None:
    """Raises UserError for a folder that holds no model."""
    if (folder / "config.json").is_file():
        return
    hint = "it has no config.json"
    if (folder / "adapter_config.json").is_file():
        hint = "that is an adapter: give its base as model.path"
    raise UserError(
        f"model.path = {path} is not a model folder ({hint})",
        "give the folder that transformers' save_pretrained wrote",
    )


def _download(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetches a hub model. The hub client locks its files, so the ranks of one machine share one download."""
    from huggingface_hub import snapshot_download

    patterns = list(HUB_PATTERNS)
    if trust_remote_code:
        patterns.append("*.py")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client's own errors (missing, gated, offline) derive from many bases
        kind = type(error).__name__
        raise UserError(
            f"model.path = {name}: neither a local folder nor reachable on the hub "
            f"({kind}: {first_line(error)})",
            "check the name, log in if the model is gated, or download it elsewhere and give the folder",
        ) from None


def tokenizer_source(section: ModelSection, folder: Path) -> str | Path:
    """Returns where the tokenizer is read from: `model.tokenizer`, else the model's own folder.

    A base with new tokens has the extended tokenizer in its folder.
    """
    if section.new_tokens and (folder / NEW_TOKENS_MARKER).is_file():
        return folder
    if section.tokenizer == SMOLLM2_NAME:
        return smollm2_folder()
    return section.tokenizer or folder


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False):
    """Loads the tokenizer of a folder or hub name.

    A missing pad token becomes the end token: padding is masked everywhere and never trained on.

    Raises:
        UserError: there is no readable tokenizer, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"no readable tokenizer in {path} ({first_line(error)})",
            "set model.tokenizer to a folder or hub name that has one",
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {path} has no end-of-sequence token", "set model.tokenizer to one that has"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_model_config(path: Path, *, trust_remote_code: bool = False):
    """Reads the transformers config of a folder.

    Raises:
        UserError: the config is unreadable, or the weights are quantised already, other than as
            bitsandbytes 4-bit (stored_four_bit.py).
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"model folder {path} is not readable ({first_line(error)})",
            "check config.json; a newer architecture may need a newer transformers",
        ) from None
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and stored_four_bit(config) is None:
        _refuse_quantized(path, quantized)
    return config


def _refuse_quantized(path: Path, quantized) -> None:
    """Raises UserError for weights that are stored in a quantised form."""
    fix = "give the unquantised model, which is quantised to NF4 while loading, or one in bitsandbytes 4-bit"
    if not isinstance(quantized, dict):
        method = getattr(quantized, "quant_method", "unknown")
        raise UserError(f"{path} is already quantised ({method})", fix)
    if quantized.get("load_in_8bit"):
        raise UserError(
            f"{path} holds 8-bit weights: 8-bit under ZeRO-3 computes wrong losses (bitsandbytes #1451)", fix
        )
    raise UserError(f"{path} is already quantised ({quantized.get('quant_method')})", fix)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns `model.dtype` as a torch dtype.

    Raises:
        UserError: bfloat16 is asked for on a GPU that does not compute in it.
    """
    return _dtype_and_reason(name, device)[0]


def dtype_line(name: str, device: torch.device) -> str:
    """Returns the line that a run announces: the dtype of the computation, and why.

    Raises:
        UserError: as `compute_dtype`.
    """
    dtype, reason = _dtype_and_reason(name, device)
    return f"dtype: {dtype_name(dtype)} ({reason})"


def _dtype_and_reason(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the dtype of the computation and why it is this one.

    `auto` on a CPU is bfloat16 where the processor multiplies it faster, which is measured once
    (cpu_products.py), and float32 elsewhere. On a GPU it is bfloat16 where the GPU computes in it
    (from Ampere on), else float16: torch emulates bfloat16 on V100 and T4, many times slower, and Triton
    refuses it there.
    """
    if device.type != "cuda":
        if name not in ("auto", "bfloat16"):
            return getattr(torch, name), f"model.dtype={name}"
        faster, reason = bfloat16_products()
        if name == "auto":
            return torch.bfloat16 if faster else torch.float32, f"model.dtype=auto: {reason}"
        slower = "" if faster else f", though {reason}: auto would take float32"
        return torch.bfloat16, f"model.dtype=bfloat16{slower}"
    lacking = _gpu_without_bfloat16(device)
    if name == "auto":
        if lacking:
            return torch.float16, f"model.dtype=auto: {lacking} does not compute in bfloat16"
        return torch.bfloat16, "model.dtype=auto: GPUs from Ampere on compute in bfloat16"
    if name == "bfloat16" and lacking:
        raise UserError(
            f"model.dtype = bfloat16, but {lacking} does not compute in bfloat16",
            "set model.dtype to auto or float16",
        )
    return getattr(torch, name), f"model.dtype={name}"


def _gpu_without_bfloat16(device: torch.device) -> str:
    """Returns the name and capability of a GPU that only emulates bfloat16, else an empty text.

    A plan for a GPU can be made where there is none. It is then taken for one of today's.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    if major >= FIRST_BFLOAT16:
        return ""
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error of another library, at most 300 characters."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
