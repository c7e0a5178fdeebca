"""What a language model thinks of a title before any task: its log-probability under a content-free prompt, full vocabulary.

The prompt names the domain and nothing else ("A movie:", a line end), then the title as the template writes targets, without the
terminator, whose probability says how a text ends and not how known the title is. Losses come from the same pass as all target losses.
"""

from __future__ import annotations

import numpy as np
import torch

# Above this size the control keeps two layers: a random model knows nothing at any depth, and memory is not spent twice.
FULL_DEPTH_PARAMETERS = 500_000_000
CONTROL_SEED = 2510  # not one that trainings use: a tiny-random base is itself a random initialisation


def content_free_prompt(context) -> list[int]:
    """Token ids: BOS where the template has one, then the domain."""
    encoder = context.recommender.encoder
    text = encoder.tokenizer(f"A {encoder.template.domain}:\n", add_special_tokens=False).input_ids
    return encoder._bos + text


def title_tokens(context) -> list[list[int]]:
    """Target tokens of every entry without the terminator."""
    return [
        list(context.recommender.encoder.target_ids(entry.text))[:-1] for entry in context.catalogue.entries
    ]


def title_log_probs(context, which: str) -> np.ndarray:
    """float64 [I], nats. `which`: `base` = the base model; `random` = the same architecture and tokenizer, initialised anew (control)."""
    titles = title_tokens(context)
    prompt = content_free_prompt(context)
    if which == "base":
        found = context.base().losses(
            [(prompt, t) for t in titles], "title log-probabilities", full_only=True
        )
        return -np.array([f["full"].sum() for f in found])
    from eval.audit.target_loss import token_losses
    from gdrt_ds.inference.prompt_reader import PromptReader

    reader = PromptReader(random_model(context))
    compute = lambda part: token_losses(reader, None, part)  # noqa: E731
    return -np.array(
        [
            f["full"].sum()
            for f in context.each(
                [(prompt, t) for t in titles], compute, "control: random initialisation", 16
            )
        ]
    )


def random_model(context):
    """The base's architecture with fresh weights; two layers of it where the base is large. float32."""
    from transformers import AutoModelForCausalLM

    from gdrt_ds.models.load import read_model_config, unwrap

    loaded = context.recommender.loaded
    config = read_model_config(
        loaded.path, trust_remote_code=context.recommender.config.model.trust_remote_code
    )
    if sum(p.numel() for p in unwrap(loaded.model).parameters()) > FULL_DEPTH_PARAMETERS:
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONTROL_SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.float().eval().to(context.recommender.reader.device)
