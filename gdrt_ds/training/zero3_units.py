"""What ZeRO-3 gathers at once: an adapted layer, not each of the five modules inside it.

DeepSpeed hooks every module. A linear layer with LoRA is five of them: the layer, its base, dropout, A and
B. The hooks run in Python before and behind each, in the forward and in the backward, and while products are
small a GPU waits for them. DeepSpeed can take a module as a unit (`set_z3_leaf_modules`): its weights are
gathered when it begins and freed when it ends, and nothing inside it has hooks. An adapted layer calls its
modules one after the other, so what is held at once hardly changes, and no value changes.

DeepSpeed's units were made for mixtures of experts, where an expert may get no token. So it waits for the
gradient of the unit's input, and puts zeros where a weight has no gradient by then. Nothing asks for the
gradient of the input of the first layer, so there it comes too early: the zeros have the size of a freed
weight, and the backward ends with an error. So the gradients of an adapted layer are reduced as without
units, each when it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from gdrt_ds.models.families import decoder


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers of the decoder that carry an adapter.

    Not the output head, whose base the fused loss calls alone; and not embeddings or stacked experts, which
    PEFT wraps in other ways.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    return [
        module
        for module in decoder(model).modules()
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    ]


@contextlib.contextmanager
def adapted_layers_as_units(model: nn.Module, stage: int) -> Iterator[int]:
    """Inside, `deepspeed.initialize` gives each adapted layer of a model one set of hooks.

    Args:
        model: a causal language model, or PEFT's around it. It may have no adapter.
        stage: of ZeRO. Below 3 nothing is gathered, so nothing changes.

    Yields:
        The number of units.
    """
    units = adapted_layers(model) if stage == 3 else []
    if not units:
        yield 0
        return
    from deepspeed.runtime.zero import stage3
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    for unit in units:
        set_z3_leaf_module(unit, True)
    ours = set(units)
    plain = stage3.z3_leaf_parameter

    def reduced_with_its_unit(parameter: nn.Parameter) -> bool:
        return plain(parameter) and parameter.ds_z3_leaf_module not in ours

    stage3.z3_leaf_parameter = reduced_with_its_unit
    try:
        yield len(units)
    finally:
        stage3.z3_leaf_parameter = plain
