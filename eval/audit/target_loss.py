"""Losses of given targets under teacher forcing: what history sensitivity and attribution read.

No catalogue is scored. `target_nll(context, prompts, targets)` is the batched public function,
`token_losses` the pass behind it: prompt and target stand in one right-padded batch, the constant prompt
prefix comes from the prompt cache (other beginnings that the rows share are read once), and the lm_head
runs on target positions only. Targets behind one prompt are its branches: the prompt is read once for all of
them, and none sees another.

Shapes: B prompts, T positions, N target tokens of the batch, H hidden, V vocabulary.
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
PADDING = -1
LOGIT_BYTES = 128 << 20  # float32 logits [rows, V] of one slice of target positions


@dataclass(frozen=True)
class Branches:
    """A prompt and the targets behind it, as one sequence.

    Attributes:
        tokens: the prompt, then every target without its last token.
        positions: of each token behind the prompt as if its branch were alone.
        branch: 0 in the prompt, 1, 2, ... in the targets.
        before: per target, the place of the token before each of its own tokens.
    """

    tokens: list[int]
    positions: list[int]
    branch: list[int]
    before: list[list[int]]

    @classmethod
    def of(cls, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> Branches:
        end = len(prompt)
        found = cls(list(prompt), list(range(end)), [0] * end, [])
        for number, target in enumerate(targets, 1):
            start, fed = len(found.tokens), len(target) - 1
            found.before.append([end - 1, *range(start, start + fed)])
            found.tokens.extend(target[:fed])
            found.positions.extend(range(end, end + fed))
            found.branch.extend([number] * fed)
        return found


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
    found = context.losses(rows_of(context, prompts, targets), what)
    return TargetNll(
        np.array([losses["full"].sum() for losses in found]),
        np.array([losses["renormalised"].sum() for losses in found]),
    )


def rows_of(
    context, prompts: Sequence[Sequence[int]], targets: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """(prompt tokens, target tokens) of every prompt and its entry, for `AuditContext.losses`."""
    encoder, entries = context.recommender.encoder, context.catalogue.entries
    return [(list(prompt), list(encoder.target_ids(entries[t].text))) for prompt, t in zip(prompts, targets)]


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
    reader.check_length(max(len(prompt) + len(target) - 1 for prompt, target in rows))
    behind: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, _) in enumerate(rows):
        behind.setdefault(tuple(prompt), []).append(row)
    prompts = list(behind)
    past = reader.shared() if skip else None
    if not skip and len(prompts) > 1:  # ablated and content-free prompts share a beginning of their own
        skip = common_length([prompt[:-1] for prompt in prompts])
        if skip * (len(prompts) - 1) < WORTH_A_PASS:
            skip = 0
        past = _read_once(reader, list(prompts[0][:skip])) if skip else None
    branches = [Branches.of(prompt, [rows[row][1] for row in members]) for prompt, members in behind.items()]
    hidden = _hidden(reader, branches, skip, past)
    # The state before a target token predicts it.
    before = {
        row: (number, places)
        for number, members in enumerate(behind.values())
        for row, places in zip(members, branches[number].before)
    }
    places = [(before[row][0], place - skip) for row in range(len(rows)) for place in before[row][1]]
    index = torch.tensor(places, device=reader.device)
    states_NH = hidden[index[:, 0], index[:, 1]]
    full, renormalised = _losses_of_states(reader, trie, states_NH, labels)
    bounds = np.cumsum([len(target) for target in labels])[:-1]
    if trie is None:
        return [{"full": losses} for losses in np.split(full, bounds)]
    return [
        {"full": f, "renormalised": r} for f, r in zip(np.split(full, bounds), np.split(renormalised, bounds))
    ]


def _hidden(reader: PromptReader, branches: list[Branches], skip: int, past) -> torch.Tensor:
    """Hidden states [B, T, H] of the tokens after the first `skip`, whose keys and values are `past`."""
    device = reader.device
    batch = len(branches)
    width = max(len(row.tokens) for row in branches) - skip
    tokens = torch.zeros(batch, width, dtype=torch.long)
    positions = torch.arange(skip, skip + width).repeat(batch, 1)
    branch = torch.full((batch, width), PADDING, dtype=torch.long)
    for number, row in enumerate(branches):
        count = len(row.tokens) - skip
        tokens[number, :count] = torch.tensor(row.tokens[skip:])
        positions[number, :count] = torch.tensor(row.positions[skip:])
        branch[number, :count] = torch.tensor(row.branch[skip:])
    tokens, positions, branch = (t.to(device) for t in (tokens, positions, branch))
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()[None]
    # A token sees the prompt and its own branch. A padding position sees itself, because a row of attention
    # without any key would be NaN.
    related = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    itself = torch.eye(width, dtype=torch.bool, device=device)[None]
    own = (causal & related & (branch != PADDING)[:, None]) | itself
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
