"""How the catalogue is scored with a model: as a tree behind each prompt, or item by item; or not at all.

Read from the layers of the model (layer_types.py), with weights or without: `--plan` and training refuse
a model that could be trained but not evaluated, before anything is spent on it.
"""

from __future__ import annotations

from torch import nn

from gdrt_ds.errors import UserError
from gdrt_ds.models.families import attention_windows, decoder, lm_head, unwrap
from gdrt_ds.models.layer_types import layer_types
from gdrt_ds.models.token_rows import token_layer


def tree_obstacle(model: nn.Module) -> str:
    """Returns why a tree of items cannot hang behind one prompt, in words; empty if it can.

    Raises:
        UserError: the catalogue cannot be scored at all (`check_evaluable`).
    """
    check_evaluable(model)
    mixing = layer_types(unwrap(model)).mixing
    if mixing:
        return mixing
    try:
        attention_windows(decoder(model).config)
    except UserError as error:
        return error.problem
    return ""


def check_evaluable(model: nn.Module) -> None:
    """Refuses models that can be trained but not evaluated.

    Raises:
        UserError: its parts are not found, it has an encoder, or its output head is quantised.
    """
    config = unwrap(model).config
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type `{config.model_type}` has an encoder, so the catalogue cannot be scored behind "
            "a prompt",
            "use a decoder-only model",
        )
    decoder(model)
    head = lm_head(model)
    if token_layer(head) is not None:
        head = token_layer(head).base_layer
    while hasattr(head, "base_layer"):  # PEFT's layer around it
        head = head.base_layer
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
        raise UserError(
            f"the output head is a {type(head).__name__}, whose rows cannot be read as floating point: "
            "neither the fused loss nor the evaluation can use it",
            "use a model whose lm_head is not quantised (bitsandbytes: llm_int8_skip_modules=['lm_head'])",
        )


def scoring_line(model: nn.Module) -> str:
    """The line that a plan or a run announces about its evaluation.

    Raises:
        UserError: the catalogue cannot be scored at all.
    """
    obstacle = tree_obstacle(model)
    if not obstacle:
        return "evaluation: the catalogue is scored as a tree, each prompt is read once"
    return (
        f"evaluation: item by item, every title behind its whole prompt ({obstacle}); exact, but slow for "
        "large catalogues: evaluate with --limit"
    )
