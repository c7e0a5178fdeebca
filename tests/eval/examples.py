"""Small worlds for the metric tests: a scorer of chosen skill over a catalogue with a long tail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

GENRES = ("Action", "Comedy", "Drama", "Horror")


def entry(
    item_id: str,
    train_count: int = 0,
    provider: str | None = None,
    genres: tuple[str, ...] = (),
    merged: tuple[str, ...] = (),
    text: str = "",
) -> Any:
    return SimpleNamespace(
        item_id=item_id,
        merged_ids=[item_id, *merged],
        text=text or f"Title {item_id}",
        train_count=train_count,
        provider=provider,
        groups={"genres": list(genres)},
    )


def prediction(
    sample_id: int, target: str, rank: float | None, top: list[str], **more: Any
) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "user_id": f"u{sample_id}",
        "target_id": target,
        "rank": rank,
        "top_ids": top,
        "top_scores": [-float(i) for i in range(len(top))],
        "target_nll": 1.0,
        "history_ids": [],
        "user": {},
        "labels": {},
        "relevance_group": None,
        **more,
    }


def world(
    num_samples: int = 300, num_items: int = 120, skill: float = 2.0, seed: int = 0, length: int = 20
) -> tuple[list[dict[str, Any]], list[Any], np.ndarray]:
    """predictions, entries and the scores [samples, items] they were made from; the data depends on the seed,
    the ranking on skill too.
    """
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.zipf(1.5, num_items).clip(0, 400))[::-1] - 1
    entries = [
        entry(
            f"i{i}",
            int(counts[i]),
            None if i % 11 == 0 else f"p{i % 7}",
            tuple(rng.choice(GENRES, rng.integers(1, 3), replace=False)),
        )
        for i in range(num_items)
    ]
    chance = (counts + 0.5) / (counts + 0.5).sum()
    predictions, all_scores = [], []
    for n in range(num_samples):
        target, history = (
            int(rng.choice(num_items, p=chance)),
            rng.choice(num_items, rng.integers(1, 9), p=chance),
        )
        scores = np.log(chance) * 0.6 + rng.gumbel(size=num_items)
        user, kind, group = (
            {"gender": str(rng.choice(["F", "M"])), "age": int(rng.integers(18, 70))},
            str(rng.choice(["a", "b"])),
            int(rng.integers(0, 4)),
        )
        scores[target] += skill
        order = np.argsort(-scores)
        log_probs = scores - np.log(np.exp(scores).sum())
        predictions.append(
            prediction(
                n,
                f"i{target}",
                float(np.flatnonzero(order == target)[0] + 1),
                [f"i{i}" for i in order[:length]],
                target_nll=float(-log_probs[target]),
                history_ids=[f"i{i}" for i in history],
                user=user,
                labels={"kind": kind},
                relevance_group=group,
                num_tied=1,
            )
        )
        all_scores.append(scores)
    return predictions, entries, np.array(all_scores)
