"""Generation that answers with titles of the catalogue only, for transformers, vLLM and SGLang.

The trie says which tokens may follow what was generated; the logits of all others become minus infinity
(`CatalogueConstraint.constrain`, the one function behind every adapter). The adapters differ in how a server
hands over the generated tokens:

- transformers: `CatalogueLogitsProcessor` takes whole rows, prompt included.
- vLLM: `vllm_processor.py` makes a `RequestConstraint` for each request.
- SGLang: `sglang_processor.py` calls `constrain_requests` with the batch.

Shapes: B rows (sequences or beams), T generated tokens, V vocabulary, n nodes of the trie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from gdrt_ds.data.trie import TokenTrie
from gdrt_ds.data.trie_file import load_trie
from gdrt_ds.errors import UserError

OUTSIDE = -1
"""The node of what is no beginning of a title."""


class CatalogueConstraint:
    """Which tokens may follow, for one catalogue.

    Attributes:
        trie: the catalogue's trie.
        end_token: the token that ends every title.
        max_tokens: tokens of the longest title, `end_token` included.
    """

    def __init__(self, trie: TokenTrie):
        leaves = trie.entry >= 0
        ends = np.unique(trie.token[leaves])
        if len(ends) != 1:
            raise UserError(
                f"the titles of this trie end with {len(ends)} different tokens", "export the run again"
            )
        self.trie = trie
        self.end_token = int(ends[0])
        self.max_tokens = int(trie.depth.max())
        self._is_leaf = leaves
        # Children stand in the order of their parents and tokens, so these keys ascend.
        child = trie.child_nodes.astype(np.int64)
        self._base = int(trie.token.max()) + 1
        self._keys = trie.parent[child].astype(np.int64) * self._base + trie.token[child]

    @classmethod
    def load(cls, folder: str | Path) -> CatalogueConstraint:
        """Reads the trie of an exported model.

        Raises:
            UserError: the folder has none.
        """
        return cls(load_trie(folder))

    def nodes_after(self, generated: np.ndarray) -> np.ndarray:
        """Returns Long[B]: the node that generated tokens [B, T] lead to.

        Tokens behind the end of a title stay at its leaf. `OUTSIDE` is what begins no title.
        """
        nodes = np.zeros(len(generated), np.int64)
        for tokens in np.asarray(generated, np.int64).T:
            open_rows = (nodes != OUTSIDE) & ~self._is_leaf[nodes]
            nodes[open_rows] = self._children(nodes[open_rows], tokens[open_rows])
        return nodes

    def _children(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        keys = nodes * self._base + tokens
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        found = (self._keys[place] == keys) & (tokens >= 0) & (tokens < self._base)
        return np.where(found, self.trie.child_nodes[place], OUTSIDE)

    def allowed(self, node: int) -> np.ndarray:
        """Returns the tokens that may follow at a node, ascending; behind a title only `end_token`."""
        if node == OUTSIDE or self._is_leaf[node]:
            return np.array([self.end_token])
        return self.trie.token[self.trie.children(node)].astype(np.int64)

    def entry_of(self, generated: Sequence[int]) -> int | None:
        """Returns the index of the catalogue entry that generated tokens are; None if they are no title."""
        node = int(self.nodes_after(np.asarray(generated, np.int64)[None])[0])
        if node == OUTSIDE or not self._is_leaf[node]:
            return None
        return int(self.trie.entry[node])

    def constrain(self, generated: Sequence[Sequence[int]] | np.ndarray, logits: Tensor) -> Tensor:
        """Returns logits [B, V] in which every token that may not follow is minus infinity.

        Args:
            generated: [B, T] or B sequences of any lengths: what was generated so far, without the prompt.
            logits: [B, V]; they are not changed.

        Raises:
            UserError: the trie has tokens that the logits do not have.
        """
        if self._base > logits.shape[-1]:
            raise UserError(
                f"the catalogue's trie has token {self._base - 1}, the logits have {logits.shape[-1]} tokens",
                "use the trie of this model; it is written with the export",
            )
        if isinstance(generated, np.ndarray):
            nodes = self.nodes_after(generated)
        else:
            nodes = np.array([self.nodes_after(np.asarray(row, np.int64)[None])[0] for row in generated])
        tokens = [self.allowed(int(node)) for node in nodes]
        rows = np.repeat(np.arange(len(tokens)), [len(row) for row in tokens])
        place = (
            torch.from_numpy(rows).to(logits.device),
            torch.from_numpy(np.concatenate(tokens)).to(logits.device),
        )
        kept = torch.full_like(logits, -torch.inf)
        kept[place] = logits[place]
        return kept


@lru_cache(maxsize=8)
def constraint_of(folder: str) -> CatalogueConstraint:
    """`CatalogueConstraint.load`, once per folder."""
    return CatalogueConstraint.load(folder)


UNCHANGED: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
    **dict.fromkeys(
        (
            "encoder_repetition_penalty",
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "sequence_bias",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "exponential_decay_length_penalty",
            "guidance_scale",
            "watermarking_config",
            "stop_strings",
            "max_time",
            # What a sample would be drawn by; without them it follows the model's own probabilities.
            "temperature",
            "top_k",
            "top_p",
            "top_h",
            "min_p",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
        )
    ),
}
"""Settings of `generate` that leave the model's probabilities as they are, and end no title early.

A base may bring others in its generation_config.json.
"""


def asks_for_catalogue(extra_args: dict[str, Any] | None) -> bool:
    """Whether a request's extra arguments say `catalogue`: true or false, or 1 or 0.

    vLLM types the values of `vllm_xargs` as text or numbers, so that a JSON `true` arrives as 1.

    Raises:
        ValueError: it is something else.
    """
    wanted = (extra_args or {}).get("catalogue", False)
    if not isinstance(wanted, (bool, int, float)) or wanted not in (0, 1):
        raise ValueError(f"extra argument catalogue = {wanted!r}: give true or false (or 1 or 0)")
    return bool(wanted)


class CatalogueLogitsProcessor(LogitsProcessor):
    """Makes transformers' `generate` answer with titles of the catalogue only.

        processor = CatalogueLogitsProcessor("MODEL", prompt_length=inputs.input_ids.shape[1])
        found = model.generate(**inputs, logits_processor=[processor], num_beams=10, num_return_sequences=10,
                               **processor.settings)

    Args:
        catalogue: an exported model's folder, or a constraint that was loaded before.
        prompt_length: columns of the prompts in `input_ids`; padding on the left counts.
    """

    def __init__(self, catalogue: str | Path | CatalogueConstraint, prompt_length: int):
        if not isinstance(catalogue, CatalogueConstraint):
            catalogue = constraint_of(str(catalogue))
        self.constraint = catalogue
        self.prompt_length = prompt_length

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `generate` with which a beam's score is the log-probability of its title.

        Probabilities are renormalised over the titles, as in evaluation; nothing is divided by lengths; a
        search ends when no open beam can enter the list; and penalties and other changes of scores that the
        base's generation_config.json may ask for are off.
        """
        return {
            **UNCHANGED,
            "max_new_tokens": self.constraint.max_tokens,
            "eos_token_id": self.constraint.end_token,
            "renormalize_logits": True,
            "length_penalty": 0.0,
            "early_stopping": "never",
            "do_sample": False,
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores [B, V] of the tokens that may follow input_ids Long[B, prompt_length + T]."""
        return self.constraint.constrain(input_ids[:, self.prompt_length :].cpu().numpy(), scores)


class RequestConstraint:
    """One request of a server that asks with the generated tokens and one row of logits, as vLLM does."""

    def __init__(self, constraint: CatalogueConstraint):
        self.constraint = constraint

    def __call__(self, output_ids: list[int], logits: Tensor) -> Tensor:
        """Returns logits [V] of the tokens that may follow `output_ids`."""
        return self.constraint.constrain([output_ids], logits[None])[0]


def constrain_requests(logits: Tensor, requests: list[dict[str, Any] | None]) -> Tensor:
    """Constrains the rows of a batch in place, as SGLang's processors do.

    Args:
        logits: [B, V].
        requests: one per row: `catalogue` names the exported model's folder, `__req__` is SGLang's request,
            whose `output_ids` were generated. Rows without `catalogue` stay as they are.
    """
    for row, request in enumerate(requests):
        if request and request.get("catalogue"):
            constraint = constraint_of(str(request["catalogue"]))
            logits[row] = constraint.constrain([request["__req__"].output_ids], logits[row][None])[0]
    return logits
