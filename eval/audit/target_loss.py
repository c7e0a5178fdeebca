"""Losses of given targets under teacher forcing: what history sensitivity and attribution read. No catalogue is scored.

`target_nll(context, prompts, targets)` is the batched public function; `token_losses` the pass behind it: prompt and target in one
right-padded batch, the constant head from the prompt cache (or whatever beginning the rows share, read once), the output head on
target positions only.

Shapes: B rows, T positions, N target tokens of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.inference.prompt_reader import PromptReader


@dataclass(frozen=True)
class TargetNll:
    """Sums over each target's tokens, nats, float64 [B]."""

    full: np.ndarray
    renormalised: np.ndarray


def target_nll(
    context, prompts: Sequence[Sequence[int]], targets: Sequence[int], what: str = "target losses"
) -> TargetNll:
    """-log P(target | prompt) under both objectives.

    Args:
        prompts: token lists, whole (also without the constant head, e.g. with a blanked instruction).
        targets: entry indices.
    """
    encoder, entries = context.recommender.encoder, context.catalogue.entries
    rows = [(list(prompt), list(encoder.target_ids(entries[t].text))) for prompt, t in zip(prompts, targets)]
    found = context.losses(rows, what)
    return TargetNll(
        np.array([f["full"].sum() for f in found]), np.array([f["renormalised"].sum() for f in found])
    )


@torch.inference_mode()
def token_losses(
    reader: PromptReader,
    trie: TokenTrie | None,
    rows: list[tuple[list[int], list[int]]],
    labels: list[list[int]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Losses per target token.

    Args:
        rows: (prompt tokens, target tokens); the loss of token t is conditioned on the prompt and on the target tokens before t as given.
        trie: of the catalogue; None = `renormalised` is left out (the targets need not be catalogue entries then).
        labels: the true targets where the given target tokens are an ablation of them; also what the trie is walked with.
    Returns:
        per row {"full", "renormalised"}: float64 [target tokens], nats. `renormalised` is 0 where the trie allows one token only.
    """
    skip = reader.num_shared
    shared_head = list(reader.head_ids[:skip])
    with_head = [list(prompt[:skip]) == shared_head and len(prompt) > skip for prompt, _ in rows]
    found: list[dict[str, np.ndarray] | None] = [None] * len(rows)
    for flag in (True, False):
        members = [i for i, value in enumerate(with_head) if value == flag]
        if members:
            part = [rows[i] for i in members]
            truth = [labels[i] if labels is not None else rows[i][1] for i in members]
            for index, losses in zip(members, _pass(reader, trie, part, truth, skip if flag else 0)):
                found[index] = losses
    return found


def common_length(sequences: list[list[int]]) -> int:
    """Tokens that all sequences begin with."""
    count = 0
    for column in zip(*sequences):
        if any(token != column[0] for token in column):
            break
        count += 1
    return count


def _read_once(reader: PromptReader, tokens: list[int]):
    """Keys and values [1, K, P, D] per layer of a shared beginning."""
    count, device = len(tokens), reader.device
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None]
    return reader.run(
        torch.tensor([tokens], device=device),
        torch.arange(count, device=device)[None],
        causal,
        None,
        None,
        record=True,
    )[1]


def _pass(
    reader: PromptReader, trie: TokenTrie | None, rows, labels, skip: int
) -> list[dict[str, np.ndarray]]:
    device = reader.device
    sequences = [list(prompt) + list(target[:-1]) for prompt, target in rows]
    reader.check_length(max(map(len, sequences)))
    past = reader.shared() if skip else None
    if not skip and len(rows) > 1:  # ablated or content-free prompts share a beginning too
        skip = common_length([prompt[:-1] for prompt, _ in rows])
        past = _read_once(reader, sequences[0][:skip]) if skip else None
    batch, width = len(rows), max(map(len, sequences)) - skip
    tokens, real = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence) - skip] = torch.tensor(sequence[skip:])
        real[row, : len(sequence) - skip] = True
    tokens, real = tokens.to(device), real.to(device)
    positions = torch.arange(skip, skip + width, device=device)[None].expand(batch, -1)
    eye = torch.eye(width, dtype=torch.bool, device=device)
    own = (torch.ones(width, width, dtype=torch.bool, device=device).tril()[None] & real[:, None]) | eye[None]
    past_positions = torch.arange(skip, device=device)[None] if skip else None
    visible = torch.cat([own.new_ones(batch, width, skip), own], dim=2)
    hidden, _ = reader.run(tokens, positions, visible, past, past_positions)
    places = [
        (row, len(prompt) - 1 - skip + t)
        for row, (prompt, _) in enumerate(rows)
        for t in range(len(labels[row]))
    ]
    index = torch.tensor(places, device=device)
    states = hidden[index[:, 0], index[:, 1]]  # [N, H]
    truth = torch.tensor([token for target in labels for token in target], device=device)
    nodes = [node for target in labels for node in trie.walk(target)] if trie is not None else []
    full, renormalised = [], []
    step = max(1, (128 << 20) // (4 * reader.rows.weight.shape[0]))
    for start in range(0, len(truth), step):
        logits = reader.rows.vocabulary_logits(states[start : start + step]).double()
        own_logit = logits.gather(1, truth[start : start + step, None])[:, 0]
        full.append((logits.logsumexp(1) - own_logit).cpu().numpy())
        allowed = [
            torch.from_numpy(trie.token[trie.children(n)].astype(np.int64)).to(device)
            for n in nodes[start : start + step]
        ]
        if trie is not None:
            renormalised.append(
                np.array(
                    [
                        float(row[a].logsumexp(0) - own) if len(a) > 1 else 0.0
                        for row, a, own in zip(logits, allowed, own_logit)
                    ]
                )
            )
    bounds = np.cumsum([len(target) for target in labels])[:-1]
    if trie is None:
        return [{"full": f} for f in np.split(np.concatenate(full), bounds)]
    return [
        {"full": f, "renormalised": r}
        for f, r in zip(
            np.split(np.concatenate(full), bounds), np.split(np.concatenate(renormalised), bounds)
        )
    ]
