"""Takes the trainable state out of a DeepSpeed engine as plain named tensors, and puts it back.

Each rank hands out the slices it owns: float32 master weights and every tensor of the optimizer's state
(Adam's moments), each with its parameter's name and offset. So a checkpoint needs no gathering, holds no
pickle and is exact to the bit. It can be cut anew for another world size, which DeepSpeed's own ZeRO-3
checkpoints cannot (#5475, #7585). ZeRO stages 1, 2 and 3 are supported.

Slices are named `<parameter>|<offset>|<key>` with key `weight` or the optimizer's own (`exp_avg`,
...); values are 1-D.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.errors import UserError

WEIGHT = "weight"
OF_THE_SETTINGS = ("weight_decay", "betas")
"""What an optimizer's group has from the settings: a checkpoint of another run does not replace it."""
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass
class FlatGroup:
    """One flat float32 buffer of the optimizer on this rank, and where the parameters lie in it.

    Attributes:
        flat: float32[n], the buffer that the inner optimizer steps on.
        pieces: (parameter name, offset in the parameter, offset in the buffer, number of values).
        group: index of the optimizer's parameter group.
    """

    flat: Tensor
    group: int
    pieces: list[tuple[str, int, int, int]] = field(default_factory=list)


def parameter_names(engine) -> dict[int, str]:
    """Returns id(parameter) -> name without the engine's prefix, of trainable parameters only."""
    return {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}


def trainable_shapes(engine) -> dict[str, tuple[int, ...]]:
    """Returns name -> full shape of every trainable parameter, also when it is sharded."""
    return {
        name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in engine.module.named_parameters()
        if p.requires_grad
    }


def flat_groups(engine) -> list[FlatGroup]:
    """Returns the optimizer's flat buffers on this rank.

    Raises:
        UserError: the buffers of this ZeRO stage or offload are not in memory.
    """
    optimizer, names, stage = engine.optimizer, parameter_names(engine), engine.zero_optimization_stage()
    if getattr(optimizer, "swap_optimizer", False):
        raise UserError(
            "offload_optimizer.device = nvme cannot be checkpointed here",
            "LoRA's optimizer state is small: use cpu or none",
        )
    groups = []
    if stage == 3:
        for index, parameters in enumerate(optimizer.fp16_groups):
            group = FlatGroup(
                optimizer.fp32_partitioned_groups_flat[index], optimizer.sub_group_to_group_id[index]
            )
            start = 0
            for parameter in parameters:
                slice_numel = parameter.partition_numel()
                offset = slice_numel * parameter.ds_zero_partition_rank
                group.pieces.append(
                    (
                        names[id(parameter)],
                        offset,
                        start,
                        max(0, min(slice_numel, parameter.ds_numel - offset)),
                    )
                )
                start += slice_numel
            groups.append(group)
    elif stage in (1, 2):
        for index, parameters in enumerate(optimizer.bit16_groups):
            group = FlatGroup(optimizer.single_partition_of_fp32_groups[index], index)
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    group.pieces.append(
                        (
                            names[id(parameter)],
                            mapping.lp_fragment_address.start,
                            mapping.hp_fragment_address.start,
                            mapping.lp_fragment_address.numel,
                        )
                    )
            groups.append(group)
    else:
        raise UserError(
            f"ZeRO stage {stage} has no sharded optimizer to checkpoint",
            "use ds_configs/zero1.json, zero2.json or zero3.json",
        )
    return groups


def _state_tensors(inner, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, value in inner.state.get(flat, {}).items():
        if torch.is_tensor(value) and value.numel() == flat.numel() and value.dim() > 0:
            yield key, value


def export_state(engine) -> tuple[dict[str, Tensor], dict]:
    """Returns the slices of this rank, and counters and optimizer scalars (JSON) that all ranks share."""
    inner, tensors = engine.optimizer.optimizer, {}
    scalars = []
    for group in flat_groups(engine):
        sources = [(WEIGHT, group.flat.data), *_state_tensors(inner, group.flat)]
        for name, offset, start, numel in group.pieces:
            for key, value in sources:
                if numel:
                    tensors[f"{name}|{offset}|{key}"] = value.detach()[start : start + numel].to(
                        "cpu", copy=True
                    )
        scalars.append(
            {
                key: float(value)
                for key, value in inner.state.get(group.flat, {}).items()
                if isinstance(value, (int, float)) or (torch.is_tensor(value) and value.dim() == 0)
            }
        )
    hyper = [
        {key: value for key, value in group.items() if key != "params" and _is_json(value)}
        for group in inner.param_groups
    ]
    common = {
        "optimizer_scalars": scalars[0] if scalars else {},
        "param_groups": hyper,
        "optimizer": type(inner).__name__,
        "counters": {name: int(getattr(engine, name)) for name in COUNTERS},
    }
    if any(s != common["optimizer_scalars"] for s in scalars):
        raise RuntimeError(
            "the optimizer's sub-groups differ in their step counts; this state cannot be written as one"
        )
    if engine.lr_scheduler is not None:
        common["lr_scheduler"] = {k: v for k, v in engine.lr_scheduler.state_dict().items() if _is_json(v)}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        common["loss_scaler"] = {
            name: float(getattr(scaler, name)) for name in SCALER_FIELDS if hasattr(scaler, name)
        }
    return tensors, common


def import_state(engine, slices: dict[str, dict[str, list[tuple[int, Tensor]]]], common: dict) -> None:
    """Puts slices of any world size into a fresh engine; bitwise on the world size they came from.

    Args:
        slices: parameter name -> key -> [(offset, values)], covering every trainable parameter.
        common: what `export_state` returned.
    Raises:
        UserError: another optimizer, or a parameter that the checkpoint does not cover.
    """
    inner = engine.optimizer.optimizer
    if common["optimizer"] != type(inner).__name__:
        raise UserError(
            f"the checkpoint was written with optimizer {common['optimizer']}, this run uses "
            f"{type(inner).__name__}",
            "resume with the optimizer (train.optimizer, offload) that the run was started with",
        )
    _check_coverage(trainable_shapes(engine), slices)
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
    for group in flat_groups(engine):
        keys = {key for name, *_ in group.pieces for key in slices[name]} - {WEIGHT}
        state = {key: torch.zeros_like(group.flat.data) for key in sorted(keys)}
        for name, offset, start, numel in group.pieces:
            for key, parts in slices[name].items():
                target = group.flat.data if key == WEIGHT else state[key]
                _copy_overlap(target, start, offset, numel, parts)
        if state or common["optimizer_scalars"]:
            for key, value in common["optimizer_scalars"].items():
                # torch keeps `step` as a float32 scalar (on the device in its fused form), DeepSpeed's CPU
                # Adam as an int
                on_device = inner.param_groups[group.group].get("fused") or inner.param_groups[
                    group.group
                ].get("capturable")
                state[key] = (
                    int(value)
                    if common["optimizer"].startswith("DeepSpeedCPU")
                    else torch.tensor(
                        value, dtype=torch.float32, device=group.flat.device if on_device else "cpu"
                    )
                )
            inner.state[group.flat] = state
    for target, source in zip(inner.param_groups, common["param_groups"]):
        target.update(
            {
                key: tuple(value) if isinstance(target.get(key), tuple) else value
                for key, value in source.items()
                if key not in OF_THE_SETTINGS
            }
        )
    _refresh_model_weights(engine)
    for name, value in common["counters"].items():
        setattr(engine, name, value)
    if engine.lr_scheduler is not None and "lr_scheduler" in common:
        engine.lr_scheduler.load_state_dict({**engine.lr_scheduler.state_dict(), **common["lr_scheduler"]})
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for name, value in common.get("loss_scaler", {}).items():
        setattr(scaler, name, value if name == "cur_scale" else int(value))


def _check_coverage(shapes: dict[str, tuple[int, ...]], slices: dict) -> None:
    missing = [name for name in shapes if name not in slices]
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of {len(shapes)} trainable parameters, e.g. {missing[0]}",
            "resume with the LoRA settings the run was started with",
        )
    for name, shape in shapes.items():
        expected = int(np.prod(shape))
        for key, parts in slices[name].items():
            found = sum(values.numel() for _, values in parts)
            if found != expected:
                raise UserError(
                    f"the checkpoint holds {found} values of {name} ({key}), the model has {expected}",
                    "resume with the LoRA settings the run was started with",
                )
    extra = sorted(set(slices) - set(shapes))
    if extra:
        raise UserError(
            f"the checkpoint holds {len(extra)} parameters that this model does not train, e.g. {extra[0]}",
            "resume with the LoRA settings the run was started with",
        )


def _copy_overlap(
    target: Tensor, start: int, offset: int, numel: int, parts: list[tuple[int, Tensor]]
) -> None:
    """Fills target[start : start+numel], values [offset, offset+numel) of the parameter, from `parts`."""
    for part_offset, values in parts:
        low, high = max(offset, part_offset), min(offset + numel, part_offset + values.numel())
        if low < high:
            target[start + low - offset : start + high - offset].copy_(
                values[low - part_offset : high - part_offset]
            )


def _refresh_model_weights(engine) -> None:
    """Sets the model's weights from the float32 masters, as the engine does after a step."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for index, parameters in enumerate(optimizer.fp16_groups):
            flat, start = optimizer.fp32_partitioned_groups_flat[index], 0
            for parameter in parameters:
                numel = parameter.partition_numel()
                parameter.ds_tensor.data.copy_(flat.data[start : start + numel])
                start += numel
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
        if any(optimizer.optimizer.state.get(flat) for flat in optimizer.single_partition_of_fp32_groups):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()


def _is_json(value) -> bool:
    try:
        json.dumps(value)
        return True
    except (TypeError, ValueError):
        return False


def export_rng() -> dict[str, Tensor]:
    """Returns the states of Python's, NumPy's, torch's CPU and the current GPU's generators as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "rng.python": torch.tensor([version, *words], dtype=torch.int64),
        "rng.python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "rng.numpy": torch.from_numpy(np.concatenate([keys.astype(np.int64), [position, has_gauss]])),
        "rng.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def import_rng(tensors: dict[str, Tensor]) -> None:
    """Undoes `export_rng`."""
    version, *words = tensors["rng.python"].tolist()
    has, gauss = tensors["rng.python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has else None))
    packed = tensors["rng.numpy"].numpy()
    np.random.set_state(
        (
            "MT19937",
            packed[:-2].astype(np.uint32),
            int(packed[-2]),
            int(packed[-1]),
            float(tensors["rng.numpy_gauss"][0]),
        )
    )
    torch.set_rng_state(tensors["rng.torch"].clone())
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"].clone())
