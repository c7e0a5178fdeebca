"""Reads a DeepSpeed JSON, fills every "auto" from the run config, and refuses contradictions.

The message of a contradiction has both numbers.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.files import no_such_preset, preset_path


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """Reads a DeepSpeed config: the user's file, or a shipped one, which is found from any folder.

    Keys of value null count as left out.

    Raises:
        UserError: missing file, invalid JSON, a section that is not an object, or a stage that is no number.
    """
    file = preset_path(path)
    if not file.is_file():
        raise no_such_preset("deepspeed config", path, "ds_configs", ".json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"deepspeed config {path}: not valid JSON: {error}", "check the comma or quote at that place"
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            f"deepspeed config {path}: expected an object, found {type(config).__name__}",
            "see ds_configs/zero3_qlora.json",
        )
    config = _without_nulls(config)
    _check_sections(config, path)
    return config


SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_param",
    "zero_optimization.offload_optimizer",
    "bf16",
    "fp16",
    "amp",
    "torch_autocast",
    "optimizer",
    "optimizer.params",
    "checkpoint",
    "weight_quantization",
    "compression_training",
)
"""Keys whose values are objects."""


def _without_nulls(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_nulls(value) for key, value in node.items() if value is not None}
    return node


def _check_sections(config: dict[str, Any], path: str) -> None:
    for name in SECTIONS:
        node: Any = config
        for part in name.split("."):
            node = node.get(part, {})
        if not isinstance(node, dict):
            raise UserError(
                f"deepspeed config {path}: {name} = {json.dumps(node)}, expected an object",
                "see ds_configs/zero3_qlora.json, or leave the key out",
            )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int):
        raise UserError(
            f"deepspeed config {path}: zero_optimization.stage = {json.dumps(stage)}, expected 1, 2 or 3",
            "write the number",
        )


def zero_stage(config: dict[str, Any]) -> int:
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def lone_rank_line(config: dict[str, Any], world: int) -> str:
    """Says that ZeRO-3 gains nothing on one rank; empty where it may: with more ranks, or an offload.

    Its work for every module is most of a step whose products are small (docs/gpu.md).
    """
    zero = config.get("zero_optimization") or {}
    offloads = [zero.get(key) or {} for key in ("offload_param", "offload_optimizer")]
    if world > 1 or zero_stage(config) < 3 or any(o.get("device", "none") != "none" for o in offloads):
        return ""
    return (
        "engine: one rank has nothing to shard, and ZeRO-3 works for every module all the same: "
        "deepspeed=ds_configs/zero1.json is faster"
    )


SMALL_ENOUGH_TO_KEEP = 1 << 25
"""Elements that may stay gathered whatever the size of a layer: 32 MiB of packed weights."""


SMALLEST_BUCKET = 1 << 20
"""Elements of gradient that are reduced together at least, where they exist.

hidden_size squared, which transformers fills in too, is 4,096 at a hidden size of 64. There each tensor of an
adapter is a bucket and a collective of its own, and a run of two ranks on gloo takes 1.4 times as long.
"""


def zero3_limits(hidden_size: int, layer_elements: int) -> dict[str, int]:
    """Returns what "auto" means for the limits of ZeRO-3, in elements as they are stored.

    - A weight that is used again within two layers stays. That is the way from the recomputed forward of a
      layer to the end of its backward, so a checkpointed layer is gathered twice a step and not three times.
      DeepSpeed's default of 1e9 elements keeps a whole model of 2 billion packed values.
    - One layer is fetched ahead, so that its gather can overlap with the products of the layer before.
    - Norms and other vectors stay whole on every rank; no matrix does.
    - max_live bounds what is fetched ahead and nothing else.

    Args:
        hidden_size: of the model.
        layer_elements: of the linear weights of one layer.
    """
    return {
        "stage3_max_reuse_distance": max(2 * layer_elements, SMALL_ENOUGH_TO_KEEP),
        "stage3_prefetch_bucket_size": layer_elements,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "stage3_max_live_parameters": max(4 * layer_elements, SMALL_ENOUGH_TO_KEEP),
    }


def fill_deepspeed_config(
    config: dict[str, Any],
    run: RunConfig,
    plan: BatchPlan,
    dtype: torch.dtype,
    hidden_size: int,
    layer_elements: int | None = None,
) -> dict[str, Any]:
    """A copy with every "auto" filled.

    The batch: train_batch_size = micro x accumulation x world. Where global_batch does not divide evenly,
    ranks carry micro-batches that differ by one sample and DeepSpeed is told the largest; loss weights are
    exact either way.

    Args:
        hidden_size: of the model.
        layer_elements: storage elements of one layer's linear weights (`Inventory.layer_elements`), from
            which ZeRO-3's limits follow; None = those of a dense layer with unquantised weights.

    Raises:
        UserError: a batch size, clipping, precision or optimizer that contradicts the run config.
    """
    micro = -(-run.train.global_batch // (plan.world * plan.accumulation))
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[run.train.optimizer]
    exact = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": plan.accumulation,
        "train_batch_size": micro * plan.accumulation * plan.world,
        "gradient_clipping": run.train.grad_clip,
    }
    settings = {
        "train_micro_batch_size_per_gpu": "train.micro_batch",
        "gradient_accumulation_steps": "train.micro_batch",
        "train_batch_size": "train.global_batch",
        "gradient_clipping": "train.grad_clip",
    }
    filled = json.loads(json.dumps(config))
    for key, value in exact.items():
        given = filled.get(key, "auto")
        if key == "train_batch_size" and given == run.train.global_batch:
            given = "auto"
        if given != "auto" and given != value:
            raise UserError(
                f"the DeepSpeed config says {key} = {given}, the run config gives {value} "
                f"({plan.describe()})",
                f'set it to "auto" in the DeepSpeed config, or change {settings[key]}',
            )
        filled[key] = value
    for section, wanted in (("bf16", dtype == torch.bfloat16), ("fp16", dtype == torch.float16)):
        entry = filled.setdefault(section, {"enabled": "auto"})
        given = entry.get("enabled", "auto")
        if given != "auto" and bool(given) != wanted:
            raise UserError(
                f"the DeepSpeed config says {section}.enabled = {str(given).lower()}, but the model "
                "computes in "
                f"{str(dtype).removeprefix('torch.')}",
                f'set {section}.enabled to "auto", or change model.dtype',
            )
        entry["enabled"] = wanted
    if not filled["bf16"]["enabled"]:
        filled["bf16"] = {"enabled": False}
    zero = filled.get("zero_optimization") or {}
    autos = {
        **zero3_limits(hidden_size, layer_elements or 12 * hidden_size**2),
        "reduce_bucket_size": max(hidden_size * hidden_size, SMALLEST_BUCKET),
        "allgather_bucket_size": int(2e8),
        "overlap_comm": torch.cuda.is_available(),
    }
    for key, value in autos.items():
        if zero.get(key) == "auto":
            zero[key] = value
    if "optimizer" in filled:
        entry = filled["optimizer"]
        given = entry.get("type", "auto")
        if given != "auto" and given.lower() != optimizer.lower():
            raise UserError(
                f"the DeepSpeed config says optimizer.type = {given}, the run config says train.optimizer = "
                f"{run.train.optimizer}",
                'set optimizer.type to "auto", or change train.optimizer',
            )
        entry["type"] = optimizer
        values = {"lr": run.train.lr, "weight_decay": run.train.weight_decay}
        if optimizer == "AdamW":
            values["betas"] = list(run.train.betas)
        params = entry.setdefault("params", {})
        for key, value in values.items():
            if params.get(key, "auto") not in ("auto", value):
                raise UserError(
                    f"the DeepSpeed config says optimizer.params.{key} = {params[key]}, the run config says "
                    f"train.{key} = {value}",
                    f'set it to "auto", or change train.{key}',
                )
            params[key] = value
    if "scheduler" in filled:
        raise UserError(
            "the DeepSpeed config has a scheduler; the learning rate is a function of the step here "
            "(train.schedule)",
            "remove the scheduler section, set train.schedule and train.warmup_steps",
        )
    left = [path for path, value in _leaves(filled) if value == "auto"]
    if left:
        raise UserError(
            f'the DeepSpeed config leaves {", ".join(left)} at "auto", which has no counterpart in the run '
            "config",
            "give a number, or remove the key",
        )
    filled.setdefault("steps_per_print", 10**9)
    filled.setdefault("zero_allow_untested_optimizer", True)
    return filled


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [
            leaf
            for key, value in node.items()
            for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)
        ]
    return [(prefix, node)]
