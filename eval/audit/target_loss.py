"""Losses of given targets under teacher forcing: what history sensitivity and attribution read.

No catalogue is scored. `target_nll(context, prompts, targets)` is the batched public function,
`token_losses` the pass behind it: prompt and target stand in one right-padded batch, the constant prompt
prefix comes from the prompt cache (other beginnings that the rows share are read once), and the lm_head
runs on target positions only.

Shapes: B rows, T positions, N target tokens of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.inference.prompt_reader import PromptReader

WORTH_A_PASS = 64
"""Tokens that a shared beginning has to save: reading it takes a forward pass of its own."""
LOGIT_BYTES = 128 << 20  # float32 logits [rows, V] of one slice of target positions


@dataclass(frozen=True)
class TargetNll:
    """-log P of each target under both scorings, summed over its tokens: nats, float64 [B]."""

    full: np.ndarray
    renormalised: np.ndarray


def target_nll(
    context, prompts: Sequence[Sequence[int]], targets: Sequence[int], what: str = "target losses"
) -> TargetNll:
    """-log P(target | prompt) under both scorings.

    Args:
        context: eval.audit.context.AuditContext.
        prompts: whole token lists, also ones that lack the constant prefix, e.g. with a blanked instruction.
        targets: entry indices.
        what: name of the passes in lines of progress.
    """
    encoder = context.recommender.encoder
    entries = context.catalogue.entries
    rows = [(list(prompt), list(encoder.target_ids(entries[t].text))) for prompt, t in zip(prompts, targets)]
    found = context.losses(rows, what)
    return TargetNll(
        np.array([losses["full"].sum() for losses in found]),
        np.array([losses["renormalised"].sum() for losses in found]),
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
        rows: (prompt tokens, target tokens). The loss of token t is conditioned on the prompt and on the
            target tokens before t as given.
        trie: of the catalogue. None leaves `renormalised` out; the targets need not be catalogue entries
            then.
        labels: the true targets, where the given target tokens are an ablation of them. The trie is walked
            with them, too.
    Returns:
        per row {"full", "renormalised"}: float64 [target tokens], nats. `renormalised` is 0 where the trie
        allows one token only.
    """
    prefix_length = reader.num_shared
    prefix = list(reader.prefix_ids[:prefix_length])
    found: list[dict[str, np.ndarray] | None] = [None] * len(rows)
    with_prefix, without = [], []
    for index, (prompt, _) in enumerate(rows):
        starts_so = list(prompt[:prefix_length]) == prefix and len(prompt) > prefix_length
        (with_prefix if starts_so else without).append(index)
    for members, skip in ((with_prefix, prefix_length), (without, 0)):
        if not members:
            continue
        part = [rows[i] for i in members]
        truth = [labels[i] if labels is not None else rows[i][1] for i in members]
        for index, losses in zip(members, _pass(reader, trie, part, truth, skip)):
            found[index] = losses
    return found


def common_length(sequences: list[list[int]]) -> int:
    """Number of tokens that all sequences begin with."""
    count = 0
    for column in zip(*sequences):
        if any(token != column[0] for token in column):
            break
        count += 1
    return count


def _read_once(reader: PromptReader, tokens: list[int]):
    """Keys and values [1, K, P, D] per layer of a shared beginning."""
    count = len(tokens)
    device = reader.device
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None]
    positions = torch.arange(count, device=device)[None]
    return reader.run(torch.tensor([tokens], device=device), positions, causal, None, None, record=True)[1]


def _pass(
    reader: PromptReader, trie: TokenTrie | None, rows, labels, skip: int
) -> list[dict[str, np.ndarray]]:
    """One padded batch. `skip`: leading tokens that come from the prompt cache; 0 = none do."""
    sequences = [list(prompt) + list(target[:-1]) for prompt, target in rows]
    reader.check_length(max(map(len, sequences)))
    past = reader.shared() if skip else None
    if not skip and len(rows) > 1:  # ablated and content-free prompts share a beginning of their own
        skip = common_length([prompt[:-1] for prompt, _ in rows])
        if skip * (len(rows) - 1) < WORTH_A_PASS:
            skip = 0
        past = _read_once(reader, sequences[0][:skip]) if skip else None
    hidden = _hidden(reader, sequences, skip, past)
    # The state before a target token predicts it: the first one is that of the prompt's last token.
    places = [
        (row, len(prompt) - 1 - skip + t)
        for row, (prompt, _) in enumerate(rows)
        for t in range(len(labels[row]))
    ]
    index = torch.tensor(places, device=reader.device)
    states_NH = hidden[index[:, 0], index[:, 1]]
    full, renormalised = _losses_of_states(reader, trie, states_NH, labels)
    bounds = np.cumsum([len(target) for target in labels])[:-1]
    if trie is None:
        return [{"full": losses} for losses in np.split(full, bounds)]
    return [
        {"full": f, "renormalised": r} for f, r in zip(np.split(full, bounds), np.split(renormalised, bounds))
    ]


def _hidden(reader: PromptReader, sequences: list[list[int]], skip: int, past) -> torch.Tensor:
    """Hidden states [B, T, H] of the tokens after the first `skip`, whose keys and values are `past`."""
    device = reader.device
    batch = len(sequences)
    width = max(map(len, sequences)) - skip
    tokens = torch.zeros(batch, width, dtype=torch.long)
    real = torch.zeros(batch, width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence) - skip] = torch.tensor(sequence[skip:])
        real[row, : len(sequence) - skip] = True
    tokens = tokens.to(device)
    real = real.to(device)
    positions = torch.arange(skip, skip + width, device=device)[None].expand(batch, -1)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()[None]
    # A padding position sees itself, because a row of attention without any key would be NaN.
    itself = torch.eye(width, dtype=torch.bool, device=device)[None]
    own = (causal & real[:, None]) | itself
    past_positions = torch.arange(skip, device=device)[None] if skip else None
    visible = torch.cat([own.new_ones(batch, width, skip), own], dim=2)
    hidden, _ = reader.run(tokens, positions, visible, past, past_positions)
    return hidden


def _losses_of_states(
    reader: PromptReader, trie: TokenTrie | None, states_NH: torch.Tensor, labels: list[list[int]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Losses [N] of the true tokens over the vocabulary, and over what the trie allows (None without)."""
    device = reader.device
    truth = torch.tensor([token for target in labels for token in target], device=device)
    nodes = []
    if trie is not None:
        nodes = [node for target in labels for node in trie.walk(target)]
    full, renormalised = [], []
    step = max(1, LOGIT_BYTES // (4 * reader.rows.weight.shape[0]))
    for start in range(0, len(truth), step):
        logits = reader.rows.vocabulary_logits(states_NH[start : start + step]).double()
        own_logit = logits.gather(1, truth[start : start + step, None])[:, 0]
        full.append((logits.logsumexp(1) - own_logit).cpu().numpy())
        if trie is None:
            continue
        for row, own, node in zip(logits, own_logit, nodes[start : start + step]):
            allowed = torch.from_numpy(trie.token[trie.children(node)].astype(np.int64)).to(device)
            choice = len(allowed) > 1
            renormalised.append(float(row[allowed].logsumexp(0) - own) if choice else 0.0)
    return np.concatenate(full), None if trie is None else np.array(renormalised)
