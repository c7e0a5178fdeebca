"""A run's adapter merged into its base model: a folder that transformers loads alone.

`export` reads from top to bottom as it happens: open the run, load base and adapter, merge, check, write,
publish. The merged model is checked twice against the logits of base + adapter: in memory, and after
transformers has loaded the written folder again. The folder's README.md comes from model_card.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gdrt_ds.config import ModelSection, RunConfig, load_config
from gdrt_ds.errors import UserError
from gdrt_ds.files import replacing
from gdrt_ds.inference.model_card import Export, model_card
from gdrt_ds.inference.recommender import base_path, check_adapter
from gdrt_ds.models.adapters import load_adapter
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.source import read_model_config
from gdrt_ds.models.stored_four_bit import stored_four_bit
from gdrt_ds.runtime import Runtime

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest allowed difference of a logit, as a share of the largest logit. Storing the weights in a dtype
rounds them."""

PROBE_TOKENS = 12
"""Length of the row of tokens whose logits are compared."""


@dataclass(frozen=True)
class OpenRun:
    """A run folder that can be exported.

    Attributes:
        folder: the run folder.
        config: its resolved config.
        base: local folder of the base model.
    """

    folder: Path
    config: RunConfig
    base: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


@dataclass(frozen=True)
class Probe:
    """What base + adapter answer, and every merged form of them has to answer too.

    Attributes:
        input_ids: [1, T] token ids.
        logits: [1, T, V] in float32.
    """

    input_ids: Tensor
    logits: Tensor

    @property
    def largest(self) -> float:
        """The largest absolute logit."""
        return float(self.logits.abs().max())

    def difference(self, model: nn.Module) -> float:
        """The largest difference between the logits of a model and the expected ones."""
        with torch.no_grad():
            return float((model(input_ids=self.input_ids).logits - self.logits).abs().max())

    def allows(self, difference: float, dtype: torch.dtype) -> bool:
        """Whether a difference is explained by weights that are rounded to `dtype`."""
        return difference <= TOLERANCE[dtype] * max(1.0, self.largest)


def export(
    run: str | Path, output: str | Path, dtype: str = "auto", base: str = "plain", shard_size: str = "4GB"
) -> dict[str, Any]:
    """Writes the merged model of a run.

    Args:
        run: run folder of a finished training.
        output: new or empty folder for the merged model.
        dtype: dtype of the stored weights; `auto` is the one in which the base is stored.
        base: `plain` merges into the original weights. `trained` merges into the weights that the adapter was
            trained on, which for a quantised base are the dequantised ones.
        shard_size: largest size of one weight file, e.g. `4GB`.

    Returns:
        {"folder", "dtype", "max_difference", "largest_logit"}; the last two are of the check of the written
        folder.

    Raises:
        UserError: no adapter, or one that does not fit the base; an output folder in use; a full disk; a
            merged model whose logits differ from those of base + adapter.
    """
    output = Path(output)
    _check_output(output)
    opened = open_finished_run(Path(run))
    stored_as = stored_dtype(opened.base) if dtype == "auto" else getattr(torch, dtype)
    if base == "plain" and stored_four_bit(read_model_config(opened.base)) is not None:
        raise UserError(
            f"--base plain: {opened.base} stores its weights in 4 bits, there are no plain ones",
            "give --base trained, which merges into the dequantised weights",
        )
    section = _loading_settings(opened.config.model, base)
    loaded = load_model(section, Runtime(), train=False, path=opened.base, adapter=opened.adapter)
    check_adapter(loaded.model, opened.adapter)
    probe = ask(loaded)
    merged = merge(with_plain_layers(loaded, section, opened))
    check_merged(merged, probe)
    with _writable(output) as scratch:
        write_model(merged, loaded.tokenizer, scratch, stored_as, shard_size)
        difference = check_written(scratch, probe, stored_as, opened.config.model.trust_remote_code)
        about = Export(opened.folder, opened.config, base, stored_as, difference, probe.largest)
        (scratch / "README.md").write_text(model_card(about), encoding="utf-8")
    return {
        "folder": str(output),
        "dtype": about.dtype_name,
        "max_difference": difference,
        "largest_logit": probe.largest,
    }


# -- open ------------------------------------------------------------------------------------------
def _check_output(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty", "choose another folder")


def open_finished_run(run: Path) -> OpenRun:
    """Reads a run folder that has an adapter.

    Raises:
        UserError: this is no run folder, it has no adapter, or its base is not there any more.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"--run {run} is not a run folder (no config.yaml)", "give the run.dir of a finished run"
        )
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise UserError(
            f"--run {run} has no adapter/ yet", "let the run finish, or resume it with resume=auto"
        )
    config = load_config(run / "config.yaml")
    return OpenRun(run, config, base_path(config.model, run / "adapter", run / "base"))


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype that a model folder's config.json names; float32 where it names none of ours."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers wrote `torch_dtype` before version 5.
    name = config.get("dtype") or config.get("torch_dtype")
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    return torch.float32


# -- load ------------------------------------------------------------------------------------------
def _loading_settings(section: ModelSection, base: str) -> ModelSection:
    """The run's model settings for a merge: float32 arithmetic on one process, quantised or not."""
    changes = {"dtype": "float32", "loading": "stock", "attention": "auto"}
    if base == "plain":
        changes["quantization"] = "none"
    return section.model_copy(update=changes)


def ask(loaded: LoadedModel) -> Probe:
    """Computes the logits that the merged model has to give."""
    input_ids = torch.arange(5, 5 + PROBE_TOKENS)[None] % len(loaded.tokenizer)
    with torch.no_grad():
        return Probe(input_ids, loaded.model(input_ids=input_ids).logits)


# -- merge -----------------------------------------------------------------------------------------
def with_plain_layers(loaded: LoadedModel, section: ModelSection, opened: OpenRun) -> nn.Module:
    """Returns base + adapter with ordinary layers, which PEFT merges without rounding to 4 bits again.

    A quantised base is loaded once more and dequantised before it takes the adapter; the first one is let go,
    so that one model is in memory at a time.
    """
    if section.quantization == "none":
        return loaded.model
    del loaded.model
    quantised = load_model(section, Runtime(), train=False, path=opened.base).model
    plain = get_quantization(section.quantization).dequantise(quantised)
    adapted, _ = load_adapter(plain, opened.adapter, opened.base, torch.float32, train=False)
    return adapted


def merge(peft_model: nn.Module) -> nn.Module:
    """Returns the plain causal LM with the adapter in its weights.

    An output head that has an adapter and is tied to the input embedding gets a weight of its own: the merge
    would change the embedding too.
    """
    model = peft_model.get_base_model()
    head = model.get_output_embeddings()
    if hasattr(head, "lora_A") and head.base_layer.weight is model.get_input_embeddings().weight:
        own = head.base_layer.weight.detach().clone()
        head.base_layer.weight = nn.Parameter(own, requires_grad=False)
        model.config.tie_word_embeddings = False
        if getattr(model, "all_tied_weights_keys", None):
            model.all_tied_weights_keys = {}
    merged = peft_model.merge_and_unload()
    merged.config.use_cache = True
    return merged


# -- check -----------------------------------------------------------------------------------------
def check_merged(model: nn.Module, probe: Probe) -> None:
    """Raises UserError if the merged model, still in memory and in float32, computes something else."""
    difference = probe.difference(model)
    if not probe.allows(difference, torch.float32):
        raise UserError(
            f"the merged model's logits differ from base + adapter by {difference:.3g}",
            "do not use it; please report the model family",
        )


def check_written(folder: Path, probe: Probe, dtype: torch.dtype, trust_remote_code: bool) -> float:
    """Loads the written folder with transformers alone and returns the largest difference of a logit.

    Raises:
        UserError: it is more than rounding to `dtype` explains.
    """
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )
    difference = probe.difference(again.eval())
    if not probe.allows(difference, dtype):
        raise UserError(
            f"the exported model's logits differ from base + adapter by {difference:.3g} (largest logit "
            f"{probe.largest:.3g})",
            "export with --dtype float32, or another --base",
        )
    return difference


# -- write -----------------------------------------------------------------------------------------
def write_model(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Saves the model in `dtype` (safetensors) and its tokenizer."""
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)


@contextmanager
def _writable(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that replaces it at the end (`files.replacing`).

    Raises:
        UserError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as scratch:
            yield scratch
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--output {output} cannot be written ({getattr(error, 'strerror', None) or error})",
            "free disk space or choose another folder",
        ) from None
