"""The train split as a step needs it.

The group of every target token, and what the objective asks for beside losses.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.batches import MicroBatch
from gdrt_ds.config import ObjectiveOptions, RunConfig
from gdrt_ds.data.prompts import TokenStore
from gdrt_ds.data.recommendation import Recommendation
from gdrt_ds.data.token_facts import ByEntry, TokenFacts
from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.dro.markov import NO_HISTORY, MarkovLosses
from gdrt_ds.errors import UserError
from gdrt_ds.loss import AllowedTokens
from gdrt_ds.objectives import Objective, TokenTable, TokenView
from gdrt_ds.runtime import to_device
from gdrt_ds.training.preparation import Prepared

LAST_STEPS = 20  # of a run whose final weights are taken: their mean, so that one batch does not decide


@dataclass(frozen=True)
class TrainTokens:
    """Facts of every target token of the train split.

    They are arrays with one value per target token, or `TokenFacts` that are asked like one.

    Attributes:
        store: the tokenised samples.
        groups: int16, in 0 .. num_groups - 1.
        weights: float64 fixed weights; None where the objective has none, which means 1.
        reference: float64 losses of the reference (dro.excess), or None.
        trie_node: int32 node of the catalogue trie at which the token is chosen (masked softmax), or None.
        trie_offsets, trie_tokens: Long[nodes + 1], Long[edges]: the tokens that may follow each node of
        the trie.
        history_free: the same samples without their history (cft), or None.
    """

    store: TokenStore
    groups: np.ndarray | TokenFacts
    num_groups: int
    weights: np.ndarray | TokenFacts | None = None
    reference: np.ndarray | TokenFacts | MarkovLosses | None = None
    trie_node: np.ndarray | TokenFacts | None = None
    trie_offsets: Tensor | None = None
    trie_tokens: Tensor | None = None
    history_free: TokenStore | None = None

    def view(
        self,
        micro: MicroBatch,
        options: ObjectiveOptions,
        losses: Tensor,
        counterfactual: Tensor | None,
        top_k_log_probs: Tensor | None,
    ) -> TokenView:
        """What the objective sees of the target tokens of a micro-batch, on the device of `losses` [N]."""
        owner = np.zeros(0, dtype=np.int64)
        if len(micro.samples):
            owner = np.repeat(micro.samples, self.store.num_target[micro.samples])
        position = (micro.token_index - self.store.target_offsets[owner]).astype(np.int64)
        length = self.store.num_target[owner].astype(np.int64)
        num_choices = None
        if self.trie_node is not None:
            node = self.trie_node[micro.token_index]
            offsets = self.trie_offsets.numpy()
            num_choices = to_device(offsets[node + 1] - offsets[node], losses.device)
        return TokenView(
            losses,
            to_device(position, losses.device),
            to_device(length, losses.device),
            options,
            counterfactual,
            top_k_log_probs,
            num_choices,
        )


@dataclass(frozen=True)
class InTrie:
    """Where the targets of a split stand in the token trie of the catalogue.

    Attributes:
        trie: of the catalogue's titles.
        node: int32[target tokens of the split] by entry, the node at which each target token is chosen.
    """

    trie: TokenTrie
    node: ByEntry

    @classmethod
    def of(cls, prepared: Prepared, split: str = "train") -> InTrie:
        """Builds the trie and walks it. The data must have a catalogue."""
        data = prepared.data
        assert isinstance(data, Recommendation)
        texts = [entry.text for entry in data.catalogue.entries]
        ids = [data.encoder.target_ids(text) for text in texts]
        trie = TokenTrie.build(ids, texts)
        nodes = np.concatenate([np.asarray(trie.walk(target), dtype=np.int32) for target in ids])
        offsets = np.concatenate([[0], np.cumsum([len(target) for target in ids])]).astype(np.int64)
        return cls(trie, ByEntry(nodes, data.stores[split], offsets, data.targets(split)))


def next_tokens(trie: TokenTrie) -> tuple[Tensor, Tensor]:
    """(Long[nodes + 1], Long[edges]): offsets of each node's children, and the tokens that lead to them."""
    offsets = torch.from_numpy(np.asarray(trie.child_offsets, dtype=np.int64))
    tokens = torch.from_numpy(np.asarray(trie.token)[np.asarray(trie.child_nodes)].astype(np.int64))
    return offsets, tokens


def allowed_tokens(
    node: np.ndarray | TokenFacts, offsets: Tensor, tokens: Tensor, micro: MicroBatch
) -> AllowedTokens:
    """The catalogue's valid next tokens at each target token of a micro-batch.

    Args:
        node: the trie node at which each target token of the split is chosen.
        offsets, tokens: what `next_tokens` gives.
    """
    return AllowedTokens(torch.from_numpy(node[micro.token_index].astype(np.int64)), offsets, tokens)


def token_weights(
    prepared: Prepared, in_trie: InTrie | None, objective: Objective, options: ObjectiveOptions
) -> np.ndarray | TokenFacts:
    """The objective's fixed weights of the train target tokens, float64.

    Args:
        in_trie: None without a catalogue. With one, the weights are kept once for each token of a title.
    """
    data = prepared.data
    if in_trie is None:
        train_count = np.repeat(data.target_counts(), prepared.stores["train"].num_target)
        table = TokenTable(np.ones(len(train_count), np.int64), train_count, None, None, None, options)
        return np.asarray(objective.token_weights(table), dtype=np.float64)
    assert isinstance(data, Recommendation)
    trie, node, offsets = in_trie.trie, in_trie.node.table, in_trie.node.offsets
    train_count = np.array([entry.train_count for entry in data.catalogue.entries])
    leaves_before = np.concatenate([[0], np.cumsum(np.asarray(trie.entry) >= 0)])
    items_below = leaves_before[np.asarray(trie.end)] - leaves_before[np.arange(len(trie.end))]
    after = items_below[np.concatenate([node[1:], [0]])]
    after[offsets[1:] - 1] = 1  # the last token of a title leaves one item
    table = TokenTable(
        counts=in_trie.node.counts(),
        train_count=np.repeat(train_count, np.diff(offsets)),
        branching=np.asarray(trie.branching)[node],
        valid_before=items_below[node],
        valid_after=after,
        options=options,
    )
    weights = np.asarray(objective.token_weights(table), dtype=np.float64)
    return in_trie.node.map(lambda _: weights)


def markov_losses(prepared: Prepared, in_trie: InTrie, config: RunConfig) -> MarkovLosses:
    """The losses that `dro.excess=markov` subtracts: of the histories that the model is given."""
    data = prepared.data
    assert isinstance(data, Recommendation)
    windows = data.windows("train").controlled(config.prompt.history, config.train.seed)
    last = np.full(len(windows), NO_HISTORY, dtype=np.int32)
    has = windows.lengths > 0
    last[has] = windows.entries[windows.ends[has] - 1]
    node = in_trie.node
    offsets = prepared.stores["train"].target_offsets
    return MarkovLosses(in_trie.trie, node.table, node.offsets, last, windows.targets, offsets)


def frozen_weights(given: list[float] | str | None, num_groups: int, device: torch.device) -> Tensor | None:
    """float64[G] on the simplex: `dro.frozen_weights` as a list, or the mean of the last steps of a run
    folder.

    Returns None if the setting is not given.

    Raises:
        UserError: a folder without metrics; another number of groups.
    """
    if given is None:
        return None
    q = torch.tensor(frozen_weights_given(given, num_groups), dtype=torch.float64, device=device)
    return q / q.sum()


def frozen_weights_given(given: list[float] | str, num_groups: int | None = None) -> list[float]:
    """The weights that `dro.frozen_weights` lists, or those at the end of the run that it names.

    Raises:
        UserError: a folder without metrics; weights that are no distribution; another number of groups.
    """
    weights = final_weights(Path(given)) if isinstance(given, str) else given
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise UserError(
            f"dro.frozen_weights = {given}: the weights {weights} are no distribution over groups",
            "give numbers of at least 0 that are not all 0; a group of weight 0 is not trained on",
        )
    if num_groups is not None and len(weights) != num_groups:
        raise UserError(
            f"dro.frozen_weights = {given} has {len(weights)} weights, there are {num_groups} groups",
            f"give {num_groups} numbers, or use the same groups.* in both runs",
        )
    return weights


def final_weights(run: Path) -> list[float]:
    """Mean group weights over the last steps of a run; a group absent in all of them has weight 0."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        last = [json.loads(line)["group_weight"] for line in lines[-LAST_STEPS:]]
    except (ValueError, KeyError, TypeError):
        last = []
    if not last:
        raise UserError(
            f"dro.frozen_weights = {run}: no metrics.jsonl there with the group weights of steps",
            "give the folder of a finished gdrt run, or a list of numbers",
        )
    rows = np.array([[np.nan if weight is None else weight for weight in row] for row in last], dtype=float)
    seen = np.isfinite(rows).sum(0)
    return (np.nansum(rows, axis=0) / np.maximum(seen, 1)).tolist()
