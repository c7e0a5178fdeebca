"""The LoRA adapter that is trained, or one that was trained before, around the frozen base (PEFT).

LoRA weights are kept in the dtype of the computation, so that the engine holds one trainable dtype.
The adapters that training compares itself with are in reference_adapters.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from gdrt_ds.config import ModelSection
from gdrt_ds.errors import UserError
from gdrt_ds.models.built_in import SMOLLM2_NAME, TINY_NAME
from gdrt_ds.models.families import lm_head_name, num_parameters, text_linear_names, towers
from gdrt_ds.models.source import dtype_name, first_line
from gdrt_ds.models.token_rows import token_indices, use_token_rows, whole_rows


def load_adapter(
    model: nn.Module, adapter: str | Path, base: Path, dtype: torch.dtype, train: bool
) -> tuple[nn.Module, str]:
    """Puts a saved adapter around the base; returns the PEFT model and the line to announce.

    Args:
        model: the loaded base.
        adapter: folder that PEFT's save_pretrained wrote.
        base: folder of the base, named in errors.
        dtype: dtype of the computation.
        train: whether the adapter is trained on; otherwise it is frozen.

    Raises:
        UserError: this is no adapter, or it does not fit the base.
    """
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter} is not a PEFT adapter (no adapter_config.json)", "give the adapter folder of a run"
        )
    try:
        peft_model = PeftModel.from_pretrained(
            model, str(adapter), is_trainable=train, autocast_adapter_dtype=False
        )
    except Exception as error:
        raise UserError(
            f"adapter {adapter} does not fit {base} ({first_line(error)})",
            "give the base model it was trained on",
        ) from None
    use_token_rows(peft_model)
    _cast_adapter(peft_model, dtype)
    return peft_model, f"adapter: {adapter}"


def new_adapter(
    model: nn.Module, section: ModelSection, base: Path, dtype: torch.dtype, seed: int, tokenizer=None
) -> tuple[nn.Module, str]:
    """Puts a fresh LoRA around the base; returns the PEFT model and the line to announce.

    Its initial values depend on the seed alone, so every rank gets the same. The process's own
    random numbers are left as they were.

    Raises:
        UserError: `model.lora.targets` names a module that the model does not have, or
            `model.lora.trainable_tokens` what is no token.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, section)
    left_out = {}
    if section.lora.targets == "all-linear":
        left_out = unadaptable(model, sorted({name.rsplit(".", 1)[-1] for name in text_linear_names(model)}))
    beside = towers(model)
    left_out |= {name: "text never passes it" for name in beside}
    rows = token_indices(model, tokenizer, section)
    lora = LoraConfig(
        r=section.lora.r,
        lora_alpha=section.lora.alpha,
        lora_dropout=section.lora.dropout,
        use_rslora=section.lora.rslora,
        use_dora=section.lora.dora,
        trainable_token_indices=rows,
        target_modules=list(targets),
        exclude_modules="|".join(rf"{re.escape(name)}\..*" for name in beside) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        with whole_rows(model, wanted=rows is not None):
            peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    use_token_rows(peft_model)
    # The adapter records its base: a hub name as the user gave it, anything else as the folder here.
    is_hub_name = not Path(section.path).exists() and section.path not in (SMOLLM2_NAME, TINY_NAME)
    is_hub_name = is_hub_name and not section.new_tokens  # such a base is made in the run folder
    recorded = peft_model.peft_config["default"]
    recorded.base_model_name_or_path = section.path if is_hub_name else str(base)
    recorded.revision = section.revision
    _cast_adapter(peft_model, dtype)
    trainable = num_parameters(peft_model, trainable_only=True)
    settings = section.lora
    line = (
        f"adapter: {adapter_kind(section)} r={settings.r} alpha={settings.alpha:g} "
        f"dropout={settings.dropout:g} on {', '.join(targets)}; {trainable:,} trainable parameters in "
        f"{dtype_name(dtype)}"
    )
    if rows is not None:
        line += f"; rows of {len(next(iter(rows.values()))):,} tokens in {' and '.join(rows)}"
    for reason in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name in left_out if left_out[name] == reason)
        line += f"; not on {names} ({reason})"
    return peft_model, line


def adapter_kind(section: ModelSection) -> str:
    """LoRA, rsLoRA, DoRA or DoRA with rsLoRA's scale."""
    if section.lora.dora and section.lora.rslora:
        return "DoRA with rsLoRA's scale"
    if section.lora.dora:
        return "DoRA"
    return "rsLoRA" if section.lora.rslora else "LoRA"


def lora_targets(model: nn.Module, section: ModelSection) -> list[str]:
    """Returns the names of the modules that get an adapter.

    `all-linear` leaves out lm_head and what PEFT cannot adapt (`unadaptable`).

    Raises:
        UserError: `model.lora.targets` names a module that the model does not have, or cannot have
            adapted.
    """
    linear = text_linear_names(model)
    head_name = lm_head_name(model)
    targets = section.lora.targets
    if targets == "all-linear":
        names = sorted({name.rsplit(".", 1)[-1] for name in linear if name != head_name})
        refused = unadaptable(model, names)
        targets = [name for name in names if name not in refused]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(
                f"model.lora.targets names {target}, which {type(model).__name__} does not have",
                f"choose among {', '.join(known)}, or all-linear",
            )
    for target, reason in unadaptable(model, targets).items():
        raise UserError(
            f"model.lora.targets names {target}, and {reason}",
            "leave it out, or set model.lora.targets=all-linear",
        )
    if section.train_head:
        return [*targets, head_name]
    return list(targets)


def unadaptable(model: nn.Module, targets: list[str]) -> dict[str, str]:
    """Returns target -> why PEFT does not put an adapter on the linear layers of this name.

    Mamba's kernels read the weight of `out_proj` past the adapter. In models whose routed experts
    are fused into one parameter (Qwen3-Next), PEFT takes the names of a shared expert's layers for
    the fused parameters: it would adapt all experts instead, with weights that ZeRO-3 does not
    gather.
    """
    from peft import LoraConfig
    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion

    reasons = {}
    for target in targets:
        lora = LoraConfig(target_modules=[target])
        try:
            tuners_utils._check_lora_target_modules_mamba(lora, model, target)
        except ValueError:
            reasons[target] = "Mamba's kernels read its weight past the adapter"
            continue
        try:
            transformers_weight_conversion.convert_peft_config_for_transformers(lora, model, None)
        except ValueError:  # half of a fused pair
            lora.target_parameters = {target}
        if lora.target_parameters:
            reasons[target] = "PEFT would adapt the fused experts in its place"
    return reasons


def _cast_adapter(model: nn.Module, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or "trainable_tokens_" in name
        if trained and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
