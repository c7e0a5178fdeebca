"""Tiny random models of five families, a random catalogue of token sequences and prompts of different
lengths, for scoring tests.
"""

from __future__ import annotations

import random

import torch
import transformers

from gdrt_ds.data.trie import TokenTrie

VOCABULARY, TERMINATOR = 97, 2
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
WINDOW = 9  # shorter than the shared head of the prompts


def family(name: str) -> torch.nn.Module:
    """A model with weights large enough that any wrong mask or position shows in the scores."""
    torch.manual_seed(0)
    t = transformers
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
    elif name == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=8))
    elif name == "mistral":
        model = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=WINDOW))
    elif name == "gemma3":
        model = t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                **SIZES,
                head_dim=8,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        )
    elif name == "gemma2":  # soft-capped logits and attention
        model = t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **SIZES,
                head_dim=8,
                sliding_window=WINDOW,
                final_logit_softcapping=5.0,
                attn_implementation="eager",
            )
        )
    elif name == "gpt2":
        model = t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=3,
                n_head=4,
                n_positions=128,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
        )
    elif name == "granite":  # scaled logits
        model = t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=4.0))
    else:
        raise ValueError(name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.18)
    return model.eval()


def catalogue_tokens(count: int = 60, seed: int = 0) -> list[list[int]]:
    """Title-like sequences: a common first token, shared prefixes, single-child tails, terminator last."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        body = tuple([5] + [rng.randrange(10, 14) for _ in range(rng.randrange(1, 8))] + [6, TERMINATOR])
        found[body] = None
    items = [list(item) for item in found]
    rng.shuffle(items)
    return items


def head_and_prompts(lengths=(0, 3, 17, 11), seed: int = 1) -> tuple[list[int], list[list[int]]]:
    """The constant head, and prompts of head + that many own tokens."""
    rng = random.Random(seed)
    head = [1] + [rng.randrange(20, 90) for _ in range(14)]
    return head, [head + [rng.randrange(20, 90) for _ in range(n)] for n in lengths]


def trie_of(items: list[list[int]]) -> TokenTrie:
    return TokenTrie.build(items)
