"""A tiny Llama and a step of a run without its engine, on any device; shared by the dry runs.

The step is the product's StepRunner. What DeepSpeed would do is left out, not imitated: the module is called
directly, `backward` is autograd's, and there are no collectives in a process that is alone.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers

from gdrt_ds import dro
from gdrt_ds.batches import BatchPlan
from gdrt_ds.config import RunConfig
from gdrt_ds.objectives import get_objective
from gdrt_ds.runtime import Runtime
from gdrt_ds.training.model_with_loss import FusedLossModel
from gdrt_ds.training.step import StepRunner
from tests.distributed.exact_cells import NUM_GROUPS, PREFIX_LENGTH, Cell, make_tokens

GLOBAL_BATCH = 8
OBJECTIVES = ("sft", "gdrt", "focal", "msl", "cvar", "igd", "cft", "group_dro", "sft_go", "bear")


def tiny_llama(device, attention: str, dtype: torch.dtype = torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=2,
        attn_implementation=attention,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=dtype
        )
    for layer in model.model.layers:  # Llama has no dropout of its own
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.1))
    return model.train()


class WithoutEngine:
    """What StepRunner asks of an engine before the optimizer: a forward and a backward."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return self.module(*args)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def backward(self, scalar: torch.Tensor, scale_wrt_gas: bool) -> None:
        scalar.backward()


def make_step(device, objective: str, packing: str, attention: str, dtype=torch.float32) -> StepRunner:
    """The runner of a step on one rank."""
    tokens = make_tokens(Cell(objective=objective))
    settings = {"objective": objective, "dro": {"cvar_over": "tokens"}}
    settings["train"] = {"global_batch": GLOBAL_BATCH, "micro_batch": GLOBAL_BATCH, "packing": packing}
    plan = BatchPlan(tokens.store.lengths, GLOBAL_BATCH, GLOBAL_BATCH, 1, 0, packing != "none")
    return StepRunner(
        WithoutEngine(FusedLossModel(tiny_llama(device, attention, dtype))),
        plan,
        tokens,
        get_objective(objective),
        RunConfig.model_validate(settings),
        dro.DroState(NUM_GROUPS).to(device),
        Runtime(device=torch.device(device)),
        packing=packing,
        prefix_length=PREFIX_LENGTH,
        pad_id=2,
    )


def run_step(runner: StepRunner):
    """What a step measured, up to the optimizer, in the order of events of its objective."""
    facts = runner._facts(0)
    slots = len(facts.groups) if runner.per_token else 0
    buffer = dro.StepBuffer(NUM_GROUPS, runner.runtime.device, slots)
    order = runner._late_order if runner.late else runner._early_order
    weighed = order(0, facts, buffer)
    runner.state.update_ema(weighed.losses, facts.counts > 0, 0.5)
    return runner._result(facts, buffer, weighed, skipped=False)


def measure_step(runner: StepRunner):
    """The part of a step that needs no gradients: forward, group sums, weights."""
    facts = runner._facts(0)
    slots = len(facts.groups) if runner.per_token else 0
    buffer = dro.StepBuffer(NUM_GROUPS, runner.runtime.device, slots)
    found = runner._forward(facts.micro_steps[0], 0, 0)
    runner._measure(found, buffer, facts.slots[0] if slots else None)
    if runner.late:
        return runner._late_weights(buffer.losses, facts, buffer)[0]
    return runner._early_weights(facts.counts)


def samples() -> np.ndarray:
    return np.arange(GLOBAL_BATCH)
