"""Chooses how the samples of a micro-batch are put into rows, and says why.

Whether rows can be packed depends on the model's layers and on its attention, so the choice stands
here and not beside the batches: packed rows need layers that keep positions apart (layer_types.py)
and the tree attention, which builds on SDPA. It is made on the model without storage, so that
`--plan` and training decide alike. gdrt_ds/training/leak_check.py then measures the loaded model.
"""

from __future__ import annotations

from gdrt_ds.config import RunConfig
from gdrt_ds.errors import UserError
from gdrt_ds.models.attention import get_backend
from gdrt_ds.models.attention.base import PACKINGS
from gdrt_ds.models.families import attention_windows, model_class, supports_sdpa
from gdrt_ds.models.layer_types import LayerTypes, layer_types
from gdrt_ds.models.skeleton import skeleton


def choose_packing(config: RunConfig, model_config) -> tuple[str, str]:
    """Returns `none`, `packed`, `shared_prefix` or `prefix_tree`, and the line to announce.

    Args:
        config: settings of the run; `train.packing` is the wish.
        model_config: transformers' config of the model.

    Raises:
        UserError: packed rows are asked for where the model's layers or its attention cannot follow
            them.
    """
    wanted = config.train.packing
    if wanted == "none":
        return wanted, "packing: none (as set)"
    possible = _packings(config.model.attention)
    chosen = ""
    if not possible or wanted not in ("auto", *possible):
        chosen = f"model.attention = {config.model.attention} is set"
    obstacle = chosen or _sdpa_obstacle(model_config)
    if not obstacle:
        model = skeleton(model_config, config.model.trust_remote_code)
        obstacle = packing_obstacle(layer_types(model), model_config)
    if wanted == "auto" and obstacle:
        return "none", f"packing: none (auto: {obstacle})"
    if wanted == "auto" and "shared_prefix" not in possible:
        why = f"no padding; model.attention = {config.model.attention} cannot share the prompt prefix"
        return "packed", f"packing: packed (auto: {why})"
    if wanted == "auto" and config.data.windows == "growing":
        return "prefix_tree", "packing: prefix_tree (auto: the histories of a block are computed once)"
    if wanted == "auto":
        line = "packing: shared_prefix (auto: no padding, the prompt prefix once per micro-batch)"
        return "shared_prefix", line
    if chosen:
        raise UserError(
            f"train.packing = {wanted} needs the tree attention, but {chosen}",
            f"set train.packing={' or '.join(['none', *possible])}, or model.attention=auto",
        )
    if obstacle:
        raise UserError(
            f"train.packing = {wanted} would let the samples of a row see each other: {obstacle}",
            "set train.packing=auto or none",
        )
    return wanted, f"packing: {wanted} (as set)"


def packing_obstacle(layers: LayerTypes, model_config) -> str:
    """Returns why the layers of a model cannot follow packed rows, empty if they can."""
    if layers.mixing:
        return layers.mixing
    try:
        by_layer, everywhere = attention_windows(model_config.get_text_config())
    except UserError as error:
        return error.problem
    return layers.not_understood(windows=everywhere is not None or any((by_layer or {}).values()))


def _packings(attention: str) -> tuple[str, ...]:
    """Returns the packings that `model.attention` can follow."""
    return PACKINGS if attention == "auto" else get_backend(attention).packings


def _sdpa_obstacle(model_config) -> str:
    """Returns why the model's attention cannot be replaced, empty if it can."""
    architecture = model_class(model_config)
    if supports_sdpa(architecture):
        return ""
    return f"{architecture.__name__} does not run on SDPA, which the tree attention builds on"
