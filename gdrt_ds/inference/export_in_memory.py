"""The export of a model that is loaded whole: the way of models that cannot be merged tensor by tensor.

`write_in_memory` loads base + adapter, merges, checks, writes and checks again. It needs two copies of
the model in float32. merging.py writes the same tensors where it can.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.files import set_usual_mode
from gdrt_ds.inference.export_checks import Probe, Written, check_loaded, check_merged, probe_ids
from gdrt_ds.inference.recommender import check_adapter
from gdrt_ds.models.adapters import load_adapter
from gdrt_ds.models.load import LoadedModel, load_model
from gdrt_ds.models.quantization import get_quantization
from gdrt_ds.models.source import dtype_name
from gdrt_ds.runtime import Runtime


def write_in_memory(
    section: ModelSection,
    base: Path,
    adapter: Path,
    folder: Path,
    dtype: torch.dtype,
    shard_size: str,
    held_in: torch.dtype = torch.float32,
) -> Written:
    """Writes weights and tokenizer of the merged model.

    Args:
        section: settings of the model.
        base, adapter: their folders.
        folder: where the model is written.
        dtype: of the stored weights.
        shard_size: largest size of one weight file.
        held_in: the dtype in which the base is held, and quantised, before it is merged in float32.

    Raises:
        UserError: an adapter that does not fit, or merged logits that differ from those of base + adapter.
    """
    section = section.model_copy(update={"dtype": dtype_name(held_in)})
    loaded = load_model(section, Runtime(), train=False, path=base, adapter=adapter)
    check_adapter(loaded.model, adapter)
    if held_in == torch.float32:
        probe = ask(loaded)
        adapted = with_plain_layers(loaded, section, base, adapter)
    else:  # the layers compute in 16 bits, which says nothing about a merge in float32
        adapted = with_plain_layers(loaded, section, base, adapter).float()
        loaded.model = adapted
        probe = ask(loaded)
    merged = merge(adapted)
    check_merged(probe.difference(merged), probe)
    write_model(merged, loaded.tokenizer, folder, dtype, shard_size)
    difference = check_loaded(folder, probe, dtype, section.trust_remote_code)
    return Written(difference, probe.largest, "loaded by transformers")


def ask(loaded: LoadedModel) -> Probe:
    """Computes the logits that the merged model has to give."""
    input_ids = probe_ids(loaded.tokenizer)
    with torch.no_grad():
        return Probe(input_ids, loaded.model(input_ids=input_ids).logits)


def with_plain_layers(loaded: LoadedModel, section: ModelSection, base: Path, adapter: Path) -> nn.Module:
    """Returns base + adapter with ordinary layers, which PEFT merges without rounding to 4 bits again.

    A quantised base is loaded once more and dequantised before it takes the adapter; the first one is let go,
    so that one model is in memory at a time.
    """
    if section.quantization == "none":
        return loaded.model
    del loaded.model
    quantised = load_model(section, Runtime(), train=False, path=base).model
    plain = get_quantization(section.quantization).dequantise(quantised)
    adapted, _ = load_adapter(plain, adapter, base, torch.float32, train=False)
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


def write_model(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Saves the model in `dtype` (safetensors) and its tokenizer."""
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard_size)
    for file in folder.glob("*.safetensors"):
        set_usual_mode(file)
    tokenizer.save_pretrained(folder)
