"""What differs between model families: where decoder, layers and lm_head are, and how logits are scaled.

The loss and the evaluation reach hidden states and the output matrix through `decoder`, `lm_head` and
`lm_head_scaling`, so that no logits are built. These functions take a model as it is or wrapped by PEFT,
torch.compile or DeepSpeed.

Shapes: B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from gdrt_ds.errors import UserError


def model_class(config):
    """Returns the transformers class of a causal language model's config, None for remote code."""
    from transformers import AutoModelForCausalLM

    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, (tuple, list)) else found


def supports_sdpa(architecture) -> bool:
    """Whether a transformers class runs on SDPA. Remote code (None) is taken to do so."""
    return getattr(architecture, "_supports_sdpa", True)


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the causal language model itself, out of a DeepSpeed engine, torch.compile and PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif model.__class__.__name__ in ("DeepSpeedEngine", "DistributedDataParallel") and hasattr(
            model, "module"
        ):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def decoder(model: nn.Module) -> nn.Module:
    """Returns the backbone; of a multimodal model its text layers alone, which is all that text passes.

    Called with input_ids it gives `last_hidden_state` [B, T, H], after the final norm.

    Raises:
        UserError: the backbone is not found.
    """
    base = unwrap(model)
    multimodal = base.config.get_text_config() is not base.config
    backbone = None if multimodal else base.base_model
    if backbone is base or backbone is None:
        backbone = base.get_decoder()
    if backbone is base or backbone is None:
        raise UserError(
            f"{type(base).__name__}: its decoder is not found",
            "use a causal language model of transformers (Llama, Qwen, Mistral, Gemma, Phi, GPT-2 ...)",
        )
    return backbone


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the transformer blocks: of all module lists of the decoder, the one with most parameters.

    Raises:
        UserError: the decoder holds no module list.
    """
    lists = [module for module in decoder(model).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"{type(unwrap(model)).__name__}: its layers are not found", "set model.compile to false"
        )
    return max(lists, key=num_parameters)


def num_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """Counts parameters, also of a module that ZeRO-3 has sharded."""
    chosen = (p for p in module.parameters() if p.requires_grad or not trainable_only)
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in chosen)


def lm_head(model: nn.Module) -> nn.Module:
    """Returns the output projection [V, H]: nn.Linear, or PEFT's LoRA layer around it. Phi-2's has a bias.

    Raises:
        UserError: the model has no output projection.
    """
    module = unwrap(model).get_output_embeddings()
    if module is None:
        raise UserError(f"{type(unwrap(model)).__name__} has no output head", "use a causal language model")
    return module


def lm_head_name(model: nn.Module) -> str | None:
    """Returns the module name of the output projection, None if the model has none."""
    output = model.get_output_embeddings()
    if output is None:
        return None
    return next((name for name, module in model.named_modules() if module is output), None)


SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call the cap of the logits: Gemma-2, RecurrentGemma, xLSTM."""


def lm_head_scaling(config) -> tuple[float, float | None]:
    """Returns (scale, softcap) of logits = softcap * tanh(scale * (W h + b) / softcap).

    A softcap of None means that nothing is capped.
    Gemma-2, RecurrentGemma and xLSTM cap their logits. Cohere and HyperCLOVA X multiply them; Granite and
    MiniCPM-like families divide them. What is not known here is measured (head_check.py).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        factor = float(config.logits_scaling)
        scale *= factor if getattr(config, "model_type", "").startswith("hyperclovax") else 1 / factor
    if getattr(config, "lm_head_multiplier", None) is not None:
        scale *= float(config.lm_head_multiplier)
    caps = (getattr(config, name, None) for name in SOFTCAPS)
    softcap = next((cap for cap in caps if cap is not None), None)
    return scale, None if softcap is None else float(softcap)


def linear_names(model: nn.Module) -> list[str]:
    """Returns the names of all modules that LoRA can adapt: Linear, its 4-bit form, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def text_linear_names(model: nn.Module) -> list[str]:
    """The same without the towers for images and sound of a multimodal model, which text never passes.

    An adapter there would get no gradient.
    """
    base = unwrap(model)
    names = linear_names(base)
    if base.config.get_text_config() is base.config:
        return names
    text = base.get_decoder()
    inside = next((name for name, module in base.named_modules() if module is text), "")
    head = lm_head_name(base)
    return [name for name in names if not inside or name == head or name.startswith(f"{inside}.")]


def towers(model: nn.Module) -> list[str]:
    """Names of the modules that hold the linear layers which `text_linear_names` leaves out."""
    kept = [name.split(".") for name in text_linear_names(model)]
    found = set()
    for name in set(linear_names(unwrap(model))) - {".".join(parts) for parts in kept}:
        parts = name.split(".")
        depth = next(d for d in range(1, len(parts) + 1) if all(k[:d] != parts[:d] for k in kept))
        found.add(".".join(parts[:depth]))
    return sorted(found)


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Returns class name -> parameters of experts that are fused into one tensor [experts, rows, columns].

    They are no linear layers: neither NF4 nor LoRA reaches them. A convolution's weight has three dimensions,
    too, and is small.
    """
    found: dict[str, int] = {}
    for module in decoder(model).modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for parameter in module.parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) >= 3 and not hasattr(parameter, "quant_state"):
                name = type(module).__name__
                found[name] = found.get(name, 0) + getattr(parameter, "ds_numel", parameter.numel())
    return found


def fused_experts_line(model: nn.Module, dtype: torch.dtype) -> str:
    """What to say about experts that a 4-bit base holds at full size; empty if there are none."""
    found = fused_experts(model)
    if not found:
        return ""
    count = sum(found.values())
    held = str(dtype).removeprefix("torch.")
    return (
        f"base: {', '.join(found)} keep {count:,} parameters ({count / num_values(model):.0%} of the base) "
        "as fused experts, which are no linear layers: they are not quantised, "
        f"stay in {held} and get no adapter"
    )


def num_values(model: nn.Module) -> int:
    """Counts parameters by the values that they hold: packed 4-bit weights count as unpacked."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.shape.numel()
        else:
            total += getattr(parameter, "ds_numel", parameter.numel())
    return total


def attention_windows(config) -> tuple[dict[str, int | None] | None, int | None]:
    """Returns the attention windows in tokens; None stands for full attention.

    Hybrid models (Gemma 3) of transformers 5 take a dict of masks by layer type: the result is
    ({layer type: window or None}, None). Uniform ones (Llama, Mistral, GPT-2) take one mask: the result is
    (None, window or None).

    Raises:
        UserError: some layers are not causal attention, e.g. recurrent or chunked layers, or an encoder.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown or getattr(config, "is_encoder_decoder", False):
        what = f"layers of type {', '.join(sorted(unknown))}" if unknown else "an encoder"
        raise UserError(
            f"model type `{config.model_type}` has {what}, which follow no mask of ours",
            "use a decoder-only model with full or sliding-window attention",
        )
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if "sliding_attention" in kinds:
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}, None
    return None, None if kinds else window


def weight_converters(model: nn.Module) -> list:
    """Returns transformers' rules that merge or split stored tensors of this model while it loads.

    Mixtures of experts have them: their files hold one matrix per expert, the model one tensor for all.
    Renamings are not among them. Empty for a transformers without such rules.
    """
    return _conversion_rules(model, "WeightConverter")


def weight_renamings(model: nn.Module) -> list:
    """Returns transformers' rules that only rename stored tensors of this model, in their order."""
    return _conversion_rules(model, "WeightRenaming")


def _conversion_rules(model: nn.Module, kind: str) -> list:
    try:
        from transformers import core_model_loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    rules = get_model_conversion_mapping(model)
    return [rule for rule in rules if isinstance(rule, getattr(core_model_loading, kind))]
