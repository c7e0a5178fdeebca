"""Measures, once after loading, whether decoder, output matrix and scaling give the model's own logits.

The loss and the scoring never build the model's own logits: they take the decoder's states, the output matrix
and `lm_head_scaling` (families.py). A family that does something else in between, a further layer or a cap
under another name, would be trained and scored with wrong probabilities, and all figures would agree with
each other. Families of `COMPARED` are compared by a test, the others here.

It costs two forward passes of a few tokens. Every rank takes part.

Shapes: N compared positions, T tokens of the probe, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gdrt_ds.errors import UserError
from gdrt_ds.models.families import decoder, lm_head, lm_head_scaling, unwrap

COMPARED = frozenset(
    "llama mistral qwen3 qwen3_moe gemma2 gemma3_text gemma3 gemma4 phi phi3 gpt2 granite cohere "
    "gpt_oss qwen3_next qwen3_5_text lfm2 falcon_h1".split()
)
"""`model_type` of the families of tests/models/family_models.py."""
PROBE_TOKENS = 12
TOLERANCE = {torch.float32: 1e-3}
"""Nats by which log-probabilities may differ, by dtype."""
HALF_TOLERANCE = 0.25


def probe_inputs(model: nn.Module, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs for `confirm_head` where rows need no layout: random tokens, and all their positions."""
    vocabulary = unwrap(model).config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, PROBE_TOKENS)
    return {"input_ids": torch.tensor(tokens, device=device)[None]}, torch.arange(PROBE_TOKENS, device=device)


@torch.no_grad()
def confirm_head(model: nn.Module, inputs: dict[str, Tensor], places: Tensor, dtype: torch.dtype) -> str:
    """Returns the line to announce; empty for the families that a test compares.

    Args:
        model: the causal language model, in PEFT or not. Its mode (train or eval) is kept.
        inputs: of a forward pass, [1, T].
        places: Long[N], the positions to compare.
        dtype: of the computation.

    Raises:
        UserError: the log-probabilities differ.
    """
    config = unwrap(model).config
    if config.model_type in COMPARED:
        return ""
    training = model.training
    model.eval()
    with _with_embedding(unwrap(model)):
        own = model(**inputs, use_cache=False).logits
    own = own.reshape(-1, own.shape[-1])[places].double().log_softmax(-1)
    states = decoder(model)(**inputs, use_cache=False).last_hidden_state
    logits = lm_head(model)(states.reshape(-1, states.shape[-1])[places]).double()
    model.train(training)
    scale, softcap = lm_head_scaling(config)
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    worst = (own - logits.log_softmax(-1)).abs().max()
    if dist.is_initialized() and dist.get_world_size() > 1:  # ranks must not differ in their answer
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    difference = float(worst)
    if not difference <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        raise UserError(
            f"model_type {config.model_type}: the model's own log-probabilities differ by {difference:.2g} "
            "nats from those of its decoder and output matrix, by which losses and scores are computed here. "
            "It does something to its logits that is not known here",
            f"use another model; those that a test compares are {', '.join(sorted(COMPARED))}",
        )
    return f"head: the model's own log-probabilities, within {difference:.1e} nats on a probe"


@contextlib.contextmanager
def _with_embedding(base: nn.Module) -> Iterator[None]:
    """Inside, ZeRO-3 gathers the input embedding for the whole forward of the backbone.

    Gemma 4's backbone reads a row of it for the places of images, past the module that has the hooks.
    """
    weight = base.get_input_embeddings().weight
    if not hasattr(weight, "ds_id") or base.base_model is base:
        yield
        return
    from deepspeed.runtime.zero import partition_parameters as zero

    zero.register_external_parameter(base.base_model, weight)
    try:
        yield
    finally:
        zero.unregister_external_parameter(base.base_model, weight)
