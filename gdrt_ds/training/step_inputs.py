"""Facts that an objective needs beside losses: places in the catalogue trie, token weights, weights fixed from the start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gdrt_ds.config import ObjectiveOptions
from gdrt_ds.errors import UserError
from gdrt_ds.objectives import Objective, TokenTable
from gdrt_ds.training.preparation import Prepared
from gdrt_ds.training.step import TrainTokens

LAST_STEPS = 20  # of a run whose final weights are taken: their mean, so that one batch does not decide


def add_trie_facts(
    tokens: TrainTokens, prepared: Prepared, objective: Objective, options: ObjectiveOptions
) -> None:
    """Where each target token of train stands in the catalogue trie: its node for masked softmax, its facts for token weights."""
    store, trie = prepared.stores["train"], prepared.trie()
    walks = {
        entry: trie.walk(prepared.encoder.target_ids(e.text))
        for entry, e in enumerate(prepared.catalogue.entries)
    }
    entries = [prepared.catalogue.index_of[s.target] for s in prepared.corpus.split("train")]
    node = np.concatenate(
        [np.asarray(walks[e][:n], dtype=np.int32) for e, n in zip(entries, store.num_target)]
    )
    if objective.masked_softmax:
        tokens.trie_node = node
        tokens.trie_offsets = torch.from_numpy(np.asarray(trie.child_offsets, dtype=np.int64))
        tokens.trie_tokens = torch.from_numpy(
            np.asarray(trie.token)[np.asarray(trie.child_nodes)].astype(np.int64)
        )
    if objective.token_weights is not None:
        leaves = np.concatenate([[0], np.cumsum(np.asarray(trie.entry) >= 0)])
        items_below = leaves[np.asarray(trie.end)] - leaves[np.arange(len(trie.end))]
        after = items_below[np.concatenate([node[1:], [0]])]
        after[store.target_offsets[1:] - 1] = 1  # the terminator leaves one item
        counts = np.array([prepared.catalogue.entries[e].train_count for e in entries])
        table = TokenTable(
            train_count=np.repeat(counts, store.num_target),
            branching=np.asarray(trie.branching)[node],
            valid_before=items_below[node],
            valid_after=after,
            options=options,
        )
        tokens.weights = np.asarray(objective.token_weights(table), dtype=np.float64)


def frozen_weights(given: list[float] | str | None, num_groups: int, device: torch.device) -> Tensor | None:
    """float64[G] on the simplex: `dro.frozen_weights` as a list, or the mean of the last steps of a run folder; None if not set.

    Raises:
        UserError: a folder without metrics; another number of groups.
    """
    if given is None:
        return None
    if isinstance(given, str):
        path = Path(given) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if not lines:
            raise UserError(
                f"dro.frozen_weights = {given}: no metrics.jsonl there",
                "give the folder of a finished gdrt run, or a list of numbers",
            )
        tail = [json.loads(line)["group_weight"] for line in lines[-LAST_STEPS:]]
        rows = np.array([[np.nan if w is None else w for w in row] for row in tail], dtype=float)
        seen = np.isfinite(rows).sum(0)  # a group that was absent in all of these steps has weight 0
        given = (np.nansum(rows, axis=0) / np.maximum(seen, 1)).tolist()
    if len(given) != num_groups:
        raise UserError(
            f"dro.frozen_weights has {len(given)} weights, there are {num_groups} groups",
            "use the same groups.* in both runs",
        )
    q = torch.tensor(given, dtype=torch.float64, device=device)
    return q / q.sum()
