"""What a language model thinks of a title before any task: its log-probability under a content-free prompt.

The prompt names the domain and nothing else ("A movie:", a line end). Then comes the title as the template
writes targets, without the terminator, whose probability says how a text ends and not how known the title
is. The probability is over the whole vocabulary, and the losses come from the same pass as all target
losses.

Shapes: I catalogue entries.
"""

from __future__ import annotations

import numpy as np
import torch

from eval.audit.target_loss import token_losses

# Above this size the control keeps two layers: a random model knows nothing at any depth, and memory is not
# spent twice.
FULL_DEPTH_PARAMETERS = 500_000_000
CONTROL_SEED = 2510  # not one that trainings use: a tiny-random base is itself a random initialisation
TITLES_BATCH = 16


def content_free_prompt(context) -> list[int]:
    """Token ids: BOS where the template has one, then the domain."""
    encoder = context.recommender.encoder
    text = encoder.tokenizer(f"A {encoder.template.domain}:\n", add_special_tokens=False).input_ids
    return encoder._bos + text


def title_tokens(context) -> list[list[int]]:
    """Target tokens of every entry without the terminator."""
    encoder = context.recommender.encoder
    return [list(encoder.target_ids(entry.text))[:-1] for entry in context.catalogue.entries]


def title_log_probs(context, which: str) -> np.ndarray:
    """Log-probability of every title, float64 [I], nats.

    Args:
        context: eval.audit.context.AuditContext.
        which: `base` = the base model; `random` = the same architecture and tokenizer, initialised anew
            (control).
    """
    prompt = content_free_prompt(context)
    rows = [(prompt, title) for title in title_tokens(context)]
    if which == "base":
        found = context.base().losses(rows, "title log-probabilities", full_only=True)
    else:
        found = _random_losses(context, rows)
    return -np.array([losses["full"].sum() for losses in found])


def _random_losses(context, rows) -> list[dict[str, np.ndarray]]:
    """Losses of a model with the base's architecture and fresh weights."""
    from gdrt_ds.inference.path_reader import make_reader

    reader = make_reader(random_model(context), [])

    def compute(part):
        return token_losses(reader, None, part)

    return context.each(rows, compute, "control: random initialisation", TITLES_BATCH)


def random_model(context):
    """The base's architecture with fresh float32 weights; two layers of it where the base is large."""
    from transformers import AutoModelForCausalLM

    from gdrt_ds.models.families import model_class, supports_sdpa, unwrap
    from gdrt_ds.models.source import read_model_config

    recommender = context.recommender
    loaded = recommender.loaded
    config = read_model_config(loaded.path, trust_remote_code=recommender.config.model.trust_remote_code)
    if sum(p.numel() for p in unwrap(loaded.model).parameters()) > FULL_DEPTH_PARAMETERS:
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONTROL_SEED)
        attention = "sdpa" if supports_sdpa(model_class(config)) else "eager"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval().to(recommender.reader.device)
