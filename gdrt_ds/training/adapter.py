"""The adapter folder: what PEFT alone can open, written after it was compared with what is in memory."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdrt_ds.files import set_usual_mode
from gdrt_ds.training import durable
from gdrt_ds.training.agreement import agree, attempt, rank_here


def save_adapter(engine, folder: str | Path, *, tokenizer=None) -> Path:
    """Writes the adapter as PEFT does (safetensors + adapter_config.json + tokenizer); every rank calls it.

    Sharded parameters are gathered one by one. The file is read back and compared, because empty adapters
    saved under ZeRO-3 are the field's classic loss (trl #4416, peft #453, #2500).

    Raises:
        UserError: on every rank, if the folder cannot be written or the adapter is empty after training
            steps.
    """
    import deepspeed
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.tmp")
    model = next(m for m in engine.module.modules() if isinstance(m, PeftModel))
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                if rank_here() == 0:
                    gathered[name] = parameter.detach().to("cpu", copy=True).contiguous()

    def write():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        tensors = get_peft_model_state_dict(
            model, state_dict=gathered, adapter_name="default", save_embedding_layers=False
        )
        if len(tensors) != len(gathered):
            raise RuntimeError(f"{len(gathered)} trainable tensors, {len(tensors)} recognised by PEFT")
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if broken:
            raise RuntimeError(f"{len(broken)} adapter matrices hold NaN or infinity, e.g. {broken[0]}")
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            scratch / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        set_usual_mode(scratch / "adapter_model.safetensors")
        durable.fsync(scratch / "adapter_model.safetensors")
        adapter_config = copy.deepcopy(model.peft_config["default"])
        adapter_config.inference_mode = True
        adapter_config.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        again = load_file(scratch / "adapter_model.safetensors")
        if set(again) != set(tensors) or any(not torch.equal(again[name], tensors[name]) for name in tensors):
            raise RuntimeError("the file read back differs from the adapter")
        empty = [name for name, value in again.items() if "lora_B" in name and not value.any()]
        if empty and engine.global_steps > engine.skipped_steps:
            raise RuntimeError(
                f"{len(empty)} adapter matrices are still zero after {engine.global_steps} steps, e.g. "
                f"{empty[0]}"
            )
        if folder.exists():
            durable.remove(folder)
        durable.rename(scratch, folder)
        durable.fsync(folder.parent)

    agree(engine, attempt(write, on=rank_here() == 0), scratch, what="adapter")
    return folder
