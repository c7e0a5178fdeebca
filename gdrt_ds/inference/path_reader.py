"""Reading for models whose layers carry state from token to token: convolutions, linear attention, Mamba.

Such a model cannot read a prompt once and hang a tree of items behind it under a mask, because these
layers follow no mask. `PathReader` gives the same answers as `PromptReader` by plain forward passes: for
every token that is asked for, the tokens that it may see are written out as one sequence, and the model
reads that sequence from its start. Sequences that begin others are not read twice. It is exact and slow:
every item is read behind its whole prompt.

What `PromptReader` keeps as keys and values is here the tokens themselves, so that all that is built on
a reader (catalogue scores, searches, losses of targets) works unchanged.

Shapes: B users, P tokens read before, T tokens forwarded now, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gdrt_ds.inference.prompt_reader import KeyValues, PromptReader
from gdrt_ds.models.scoring_choice import tree_obstacle

TOKENS_PER_PASS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one forward pass, padding included."""

Sequence = tuple[int, ...]


@dataclass
class PathReader(PromptReader):
    """A causal LM that reads every sequence from its start. Arguments as of `PromptReader`."""

    def _take_masks(self) -> None:
        """No masks are made: every sequence is read plainly, with the model's own attention."""
        self.windows = None
        self.window = None

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        past: KeyValues | None,
        past_positions: Tensor | None,
        record: bool = False,
        grow: bool = False,
    ) -> tuple[Tensor, KeyValues]:
        """Forwards tokens behind others; see `PromptReader.run`. Cached are the tokens [B or 1, 1, P, 1]."""
        batch, width = tokens.shape
        own = tokens[:, None, :, None]
        if past is None:
            seen_tokens = tokens
            seen_positions = positions
        else:
            before = past[0][0].expand(batch, -1, -1, -1)
            whole = torch.cat([before, own], dim=2)
            seen_tokens = whole[:, 0, :, 0]
            seen_positions = torch.cat([past_positions.expand(batch, -1), positions], dim=1)
            if grow:
                past[0] = (whole, whole)
        asked = _sequences(seen_tokens, seen_positions, visible.expand(batch, -1, -1))
        states = self._states(asked)
        hidden = torch.stack([states[sequence] for sequence in asked]).view(batch, width, -1)
        return hidden, [(own, own)] if record else []

    def _states(self, asked: list[Sequence]) -> dict[Sequence, Tensor]:
        """The hidden state [H] of the last token of every sequence."""
        rows = longest_paths(asked)
        rows.sort(key=len)
        limit = TOKENS_PER_PASS.get(self.device.type, 4096)
        wanted = set(asked)
        states = {}
        while rows:
            count = max(1, min(len(rows), limit // len(rows[-1])))
            for sequence, hidden in zip(rows[-count:], self._read_plainly(rows[-count:]), strict=True):
                for end in range(1, len(sequence) + 1):
                    if sequence[:end] in wanted:
                        # A copy: a view would keep the states of all tokens of all rows.
                        states[sequence[:end]] = hidden[end - 1].clone()
            del rows[-count:]
        return states

    def _read_plainly(self, rows: list[Sequence]) -> Tensor:
        """Hidden states [rows, T, H] of right-padded sequences.

        No layer lets padding reach what stands before it.
        """
        width = max(map(len, rows))
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
            real[index, : len(row)] = 1
        output = self.decoder(
            input_ids=tokens.to(self.device), attention_mask=real.to(self.device), use_cache=False
        )
        return output.last_hidden_state


def _sequences(tokens: Tensor, positions: Tensor, visible: Tensor) -> list[Sequence]:
    """For each of B * T queries, the tokens that it sees, in the order of their positions.

    Args:
        tokens, positions: Long[B, P + T]. visible: Bool[B, T, P + T].
    """
    found = []
    order = positions.argsort(dim=1, stable=True).cpu()
    tokens = tokens.cpu().gather(1, order)
    visible = visible.cpu()
    for row in range(tokens.shape[0]):
        ordered = visible[row][:, order[row]]
        found += [tuple(tokens[row, seen].tolist()) for seen in ordered]
    return found


def longest_paths(sequences: list[Sequence]) -> list[Sequence]:
    """The sequences that no other one begins with."""
    kept: list[Sequence] = []
    # Behind a sequence, sorted, come those that begin with it; so the last one kept is enough to compare
    # with.
    for sequence in sorted(set(sequences), reverse=True):
        if not kept or kept[-1][: len(sequence)] != sequence:
            kept.append(sequence)
    return kept


def make_reader(model: nn.Module, prefix_ids: list[int], padding_side: str = "right") -> PromptReader:
    """Returns the reader that suits the layers of the model: trees where they follow masks, else sequences.

    Raises:
        UserError: no way of scoring fits the model.
    """
    if tree_obstacle(model):
        return PathReader(model, prefix_ids, padding_side)
    return PromptReader(model, prefix_ids, padding_side)
