"""Adapter weights of a published checkpoint, without DeepSpeed.

The ranks' parts of RUN/checkpoints/step_N are put together.

    weights = adapter_weights(RUN / "checkpoints" / "step_40");  set_adapter(model, weights)
Names of the parts are gdrt_ds.training.engine_state's: `<parameter>|<offset>|weight`, float32, 1-D, of any
world size.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gdrt_ds.errors import UserError
from gdrt_ds.training.checkpoint import STEP_PATTERN, verify
from gdrt_ds.training.engine_state import WEIGHT


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, ascending."""
    found = []
    for path in sorted((run / "checkpoints").glob("step_*")):
        match = STEP_PATTERN.match(path.name)
        if match and not match.group(2) and path.is_dir():
            files = [(file.name, file.stat()) for file in sorted(path.iterdir())]
            stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
            if _is_whole(path, stamps):
                found.append((int(match.group(1)), path))
    return sorted(found)


@functools.lru_cache(maxsize=256)
def _is_whole(folder: Path, stamps: tuple) -> bool:
    """Whether the checksums hold. That reads all files, and audits ask often; `stamps` change with files."""
    return verify(folder) is None


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """Parameter name (as PEFT names it) -> flat float32 weights.

    Raises:
        UserError: parts with a hole or an overlap.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for file in sorted(folder.glob("rank_*.safetensors")):
        with safe_open(file, "pt") as stored:
            for key in stored.keys():
                name, _, rest = key.partition("|")
                offset, _, kind = rest.partition("|")
                if kind == WEIGHT:
                    parts.setdefault(name.removeprefix("model."), []).append(
                        (int(offset), stored.get_tensor(key))
                    )
    if not parts:
        raise UserError(
            f"checkpoint {folder} holds no weights", "give a checkpoint that this project's trainer wrote"
        )
    whole = {}
    for name, pieces in parts.items():
        position = 0
        pieces.sort(key=lambda piece: piece[0])
        for offset, values in pieces:
            if offset != position:
                raise UserError(
                    f"checkpoint {folder}: the parts of {name} do not join at value {position}",
                    "the checkpoint is damaged; use another one",
                )
            position += values.numel()
        whole[name] = torch.cat([values for _, values in pieces])
    return whole


@torch.no_grad()
def set_adapter(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies checkpoint weights into an unmerged PEFT model.

    Raises:
        UserError: weights that the model lacks, adapter weights that the checkpoint lacks, or other sizes.
    """
    parameters = dict(model.named_parameters())
    wanted = {name for name in parameters if "lora_" in name or "trainable_tokens_" in name}
    if (missing := sorted(set(weights) - set(parameters))) or (missing := sorted(wanted - set(weights))):
        raise UserError(
            f"checkpoint and adapter differ in {len(missing)} weights, e.g. {missing[0]}",
            "use the checkpoints of the same run as the adapter",
        )
    for name, values in weights.items():
        target = parameters[name]
        if target.numel() != values.numel():
            raise UserError(
                f"checkpoint weight {name} has {values.numel()} values, the adapter {target.numel()}",
                "use the checkpoints of the same run",
            )
        target.copy_(values.view(target.shape).to(target.dtype).to(target.device))
