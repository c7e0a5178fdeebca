"""A number for each token of a sample that stands for everything up to it: equal prefixes have equal keys.

Dropout masks are made from these keys (models/prefix_dropout.py), so they do not hang on how samples are laid
out, split into micro-batches, or spread over ranks.
"""

from __future__ import annotations

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that its powers modulo 2^64 never vanish, and neither does what a token adds."""
PADDING_KEY = 0


def step_entropy(seed: int, step: int) -> int:
    """Returns 64 bits that differ between seeds and between optimizer steps."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def token_keys(tokens: np.ndarray, entropy: int) -> np.ndarray:
    """Returns the keys of a sample's tokens, int64[T].

    A key is the polynomial of the tokens up to it, modulo 2^64, mixed with `entropy`. That two different
    prefixes of a step have one key is a coincidence of 64 bits.

    Args:
        tokens: int[T], token ids of at least 0.
        entropy: what `step_entropy` returns.
    """
    powers = np.cumprod(np.full(len(tokens), BASE))
    polynomial = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers)
    return _mixed(polynomial ^ np.uint64(entropy)).view(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): each bit depends on all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
