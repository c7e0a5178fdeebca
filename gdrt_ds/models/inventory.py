"""Counts what a model is made of, on its skeleton without storage: for the memory plan and for ZeRO's limits.

transformers' own classes build the skeleton, so every family is counted as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.models.families import (
    fused_experts,
    linear_names,
    lm_head_name,
    text_linear_names,
    weight_converters,
)
from gdrt_ds.models.quantization import get_quantization, storage_dtype
from gdrt_ds.models.skeleton import skeleton


@dataclass(frozen=True)
class Inventory:
    """How many elements of each kind a model has.

    Attributes:
        quantised: elements of the linear layers that are held in 4 bits; 0 without quantization.
        plain: all other elements of the base.
        lora: trainable elements of the adapter.
        linear: elements of the linear layers other than lm_head, quantised or not.
        largest: elements of the largest of them.
        layers, hidden, intermediate, query, key_value, vocabulary: sizes.
        lora_inputs, lora_outputs: summed input and output sizes of the adapted modules of one layer.
        heads: of queries.
        capped: whether attention scores are capped (Gemma 2).
        experts: elements of fused experts, which are counted in `plain`: a 4-bit base holds them at full
            size.
        converted: transformers merges or splits the stored tensors while it loads, so ranks cannot read
            slices of them.
        untied: embedding and lm_head are two matrices.
    """

    quantised: int
    plain: int
    lora: int
    linear: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    lora_inputs: int
    lora_outputs: int = 0
    heads: int = 0
    capped: bool = False
    experts: int = 0
    converted: bool = False
    untied: bool = False

    def layer_elements(self, section: ModelSection) -> int:
        """Returns the storage elements of one layer: what ZeRO-3 gathers for it, experts included.

        DeepSpeed counts its limits in elements as they are stored. One element of a packed weight holds two
        values as uint8 and four as bfloat16.
        """
        elements = self.linear
        if self.quantised:
            item = torch.empty((), dtype=storage_dtype(section)).element_size()
            elements = -(-self.linear // (2 * item))
        return -(-(elements + self.experts) // self.layers)


def take_inventory(section: ModelSection, model_config) -> Inventory:
    """Counts on a model without storage.

    Args:
        section: settings of the model.
        model_config: its transformers config; no weights are read.

    Raises:
        UserError: transformers cannot build it.
    """
    model = skeleton(model_config, section.trust_remote_code)
    text = model_config.get_text_config()
    names = linear_names(model)
    head = lm_head_name(model)
    is_quantised = get_quantization(section.quantization).bytes_of is not None
    linear = {name: model.get_submodule(name).weight for name in names}
    quantised = sum(w.numel() for name, w in linear.items() if name != head) if is_quantised else 0
    total = sum(p.numel() for p in model.parameters())
    targets = section.lora.targets
    adapted = [
        n
        for n in text_linear_names(model)
        if n != head and (targets == "all-linear" or n.rsplit(".", 1)[-1] in targets)
    ]
    if section.train_head and head:
        adapted.append(head)
    shapes = {name: _in_out(model.get_submodule(name)) for name in adapted}
    layers = int(text.num_hidden_layers)
    lora = section.lora.r * sum(i + o for i, o in shapes.values())
    if section.lora.dora:
        lora += sum(o for _, o in shapes.values())  # the length of every row
    query, key_value = _attention_widths(model, text)
    intermediate = _size(text, "intermediate_size") or _size(text, "n_inner") or 4 * text.hidden_size
    return Inventory(
        quantised=quantised,
        plain=total - quantised,
        lora=lora,
        linear=sum(w.numel() for name, w in linear.items() if name != head),
        largest=max((w.numel() for n, w in linear.items() if n != head), default=0),
        layers=layers,
        hidden=int(text.hidden_size),
        intermediate=intermediate,
        query=query,
        key_value=key_value,
        vocabulary=int(text.vocab_size),
        lora_inputs=sum(i for n, (i, _) in shapes.items() if n != head) // layers,
        lora_outputs=sum(o for n, (_, o) in shapes.items() if n != head) // layers,
        heads=_size(text, "num_attention_heads"),
        capped=bool(getattr(text, "attn_logit_softcapping", None)),
        experts=sum(fused_experts(model).values()),
        converted=bool(weight_converters(model)),
        untied=_is_untied(model),
    )


def _size(text, name: str) -> int:
    """A size of the config, the largest where layers differ (Gemma 3n); 0 where there is none.

    Some configs refuse a question that has an answer per layer (Gemma 4).
    """
    try:
        value = getattr(text, name, None)
    except Exception:
        return 0
    return int(max(value, default=0) if isinstance(value, (list, tuple)) else value or 0)


def _attention_widths(model: nn.Module, text) -> tuple[int, int]:
    """Widths of queries and of keys, the widest of all layers; 0 without attention (Mamba)."""
    heads = _size(text, "num_attention_heads")
    head_size = _size(text, "head_dim") or (text.hidden_size // heads if heads else 0)
    query = heads * head_size
    key_value = (_size(text, "num_key_value_heads") or heads) * head_size
    made = {"q_proj": 0, "k_proj": 0}
    for name in text_linear_names(model):
        last = name.rsplit(".", 1)[-1]
        if last in made:
            made[last] = max(made[last], _in_out(model.get_submodule(name))[1])
    return made["q_proj"] or query, made["k_proj"] or key_value


def _is_untied(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is not model.get_input_embeddings().weight


def _in_out(module: nn.Module) -> tuple[int, int]:
    shape = tuple(module.weight.shape)
    return (shape[1], shape[0]) if isinstance(module, nn.Linear) else shape
