"""The table of model families that the tests train, pack and evaluate: tiny, random, made on the
spot.

docs/support-matrix.md shows the same table, and a test compares the two. `python -m
tests.models.family_models` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from gdrt_ds.models.built_in import make_tiny_model

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DELTA_NET = dict(
    num_hidden_layers=4,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
WINDOW = 5
"""Sliding windows in tokens, shorter than the samples of the tests."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        title: its name in the docs.
        config: name of transformers' config class.
        changes: what differs from SIZES.
        packs: whether samples may stand in one row.
        why_not: a part of the reason that is announced where they may not.
        tree_scoring: whether the catalogue is scored as a tree; otherwise item by item.
    """

    title: str
    config: str
    changes: dict = field(default_factory=dict)
    packs: bool = True
    why_not: str = ""
    tree_scoring: bool = True


FAMILIES = {
    "llama": Family("Llama", "LlamaConfig"),
    "mistral": Family("Mistral", "MistralConfig", {"sliding_window": None}),
    "mistral_window": Family("Mistral, sliding window", "MistralConfig", {"sliding_window": WINDOW}),
    "qwen3": Family("Qwen3", "Qwen3Config", {"head_dim": 8}),
    "qwen3_moe": Family("Qwen3-MoE", "Qwen3MoeConfig", {"head_dim": 8, "decoder_sparse_step": 1, **EXPERTS}),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
        packs=False,
        why_not="Gemma2ForCausalLM does not run on SDPA",
    ),
    "gemma3": Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3_images": Family(
        "Gemma 3 that also reads images",
        "Gemma3Config",
        {
            "text_config": {
                "head_dim": 8,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "gemma4": Family(
        "Gemma 4",
        "Gemma4Config",
        {
            "text_config": {
                "head_dim": 8,
                "global_head_dim": 8,
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 320,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            "audio_config": None,
        },
    ),
    "phi": Family("Phi", "PhiConfig"),
    "phi3": Family("Phi-3", "Phi3Config", {"sliding_window": WINDOW}),
    "gpt2": Family("GPT-2", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "granite": Family("Granite", "GraniteConfig", {"logits_scaling": 4.0}),
    "cohere": Family("Cohere", "CohereConfig"),
    "gpt_oss": Family(
        "gpt-oss",
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        packs=False,
        why_not="GptOssForCausalLM does not run on SDPA",
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        {"head_dim": 8, "shared_expert_intermediate_size": 16, **EXPERTS, **DELTA_NET},
        packs=False,
        why_not="Qwen3NextGatedDeltaNet",
        tree_scoring=False,
    ),
    "qwen3_5": Family(
        "Qwen3.5",
        "Qwen3_5TextConfig",
        {"head_dim": 8, **DELTA_NET},
        packs=False,
        why_not="Qwen3_5GatedDeltaNet",
        tree_scoring=False,
    ),
    "lfm2": Family(
        "LFM2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
        packs=False,
        why_not="Lfm2ShortConv",
        tree_scoring=False,
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        "FalconH1Config",
        {
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        packs=False,
        why_not="FalconH1Mixer",
        tree_scoring=False,
    ),
}
TITLES = [
    "Alien (1979)",
    "The Thing (1982)",
    "Brazil (1985)",
    "Heat (1995)",
    "Fargo (1996)",
    "Alien 3 (1992)",
]


def family_config(name: str, vocabulary: int):
    """transformers' config of a tiny model of the family, without dropout."""
    family = FAMILIES[name]
    sizes = SIZES
    if name == "gpt2":
        sizes = {key: value for key, value in SIZES.items() if key.endswith("_token_id")}
    sizes = {**sizes, "vocab_size": vocabulary}
    changes = {**family.changes}
    if text := changes.pop("text_config", None):
        special = {key: value for key, value in sizes.items() if key.endswith("_token_id")}
        changes["text_config"], sizes = {**sizes, **text}, special
    config = getattr(transformers, family.config)(**{**sizes, **changes})
    for attribute in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, attribute):
            setattr(config, attribute, 0.0)
    return config


def spread_weights(model: torch.nn.Module) -> None:
    """Random matrices so wide that a wrong mask or position shows in losses and scores."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)


def make_family(name: str, folder: Path) -> Path:
    """A model folder with tokenizer. Weights are wide enough that a wrong mask or position
    shows."""
    path = folder / name
    if path.exists():
        return path
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_tiny_model(folder / "words", TITLES, 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for vectors: some families draw decay rates, for example
        model = transformers.AutoModelForCausalLM.from_config(family_config(name, len(tokenizer)))
    spread_weights(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def family_table() -> list[str]:
    """The lines of the table in docs/support-matrix.md."""
    lines = ["| family | samples share rows | catalogue scored |", "|---|---|---|"]
    for family in FAMILIES.values():
        packs = "yes" if family.packs else f"no: {family.why_not}"
        scored = "as a tree" if family.tree_scoring else "item by item"
        lines.append(f"| {family.title} | {packs} | {scored} |")
    return lines


if __name__ == "__main__":
    print("\n".join(family_table()))
