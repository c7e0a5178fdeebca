"""Rows of prompt and completion as tokens.

    [BOS] prompt | completion, terminator                         as they are
    chat template around the turns | completion, terminator       messages, or prompt.template=chat

Pieces are tokenised apart, so that the tokens of a completion do not depend on its prompt, and the same
prompt is the same tokens in training, scoring and audits. Text of special tokens counts as such in a prompt
that is taken as it is, because its author wrote the whole prompt; in messages and completions it is ordinary
text.

A run saves the pieces of its conversations in prompt.json, because some chat templates write today's date.

Shapes: T tokens of a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.config import PromptSection
from gdrt_ds.data.prompts import HISTORY, TARGET, TEMPLATE, EncodedPrompt
from gdrt_ds.data.templates import adds_bos
from gdrt_ds.data.text_rows import Message, Prompt, Span, TextRow
from gdrt_ds.errors import UserError
from gdrt_ds.files import write_json

STYLE = "rows"
"""`style` in prompt.json, which tells such runs from recommenders."""
OUTSIDE = "(outside)"
"""Label of the tokens of a completion that no span covers, the terminator among them."""


class RowEncoder:
    """Turns rows into tokens.

    Args:
        prompt: settings.
        tokenizer: of transformers; a fast one, because spans need the characters of each token.
        pieces: of conversations, as an earlier run saved them (`load`).

    Raises:
        UserError: a tokenizer without EOS, or a template file, which is about histories of items.
    """

    def __init__(
        self, prompt: PromptSection, tokenizer: Any, pieces: dict[tuple[str, ...], list[str]] | None = None
    ):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every completion",
                "set model.tokenizer to one that has an eos_token",
            )
        if prompt.template.endswith(".json"):
            raise UserError(
                f"prompt.template={prompt.template}: a template file is about histories of items, and these "
                "data are rows of prompt and completion",
                "leave prompt.template away (prompts are taken as they are), or set prompt.template=chat",
            )
        self.chat = prompt.template == "chat"
        self.max_length = prompt.max_length
        self.tokenizer = tokenizer
        self._bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
        self._pieces: dict[tuple[str, ...], list[str]] = dict(pieces or {})
        self._literals: dict[str, list[int]] = {}

    # -- one row
    def encode(self, row: TextRow, prompt: Prompt | None = None, completion: str | None = None):
        """Encodes one row.

        Args:
            prompt: stands for the row's own, e.g. its auxiliary prompt.
            completion: stands for the row's own, e.g. another answer of its choices.

        Returns:
            EncodedPrompt; `num_dropped` counts tokens that the beginning of the prompt lost for length.

        Raises:
            UserError: the completion alone is longer than prompt.max_length.
        """
        ids, segments, end = self._prompt_ids(row.prompt if prompt is None else prompt)
        target = self.completion_ids(row.completion if completion is None else completion, end)
        room = self.max_length - len(target)
        if room < 1:
            raise UserError(
                f"prompt.max_length={self.max_length}: a completion has {len(target)} tokens, and one of the "
                f"prompt has to stand before it: {row.completion[:60]!r}",
                f"set prompt.max_length to at least {len(target) + 1}",
            )
        dropped = max(0, len(ids) - room)
        ids = np.asarray(ids[dropped:] + target, np.int32)
        segments = np.asarray(segments[dropped:] + [TARGET] * len(target), np.int8)
        slots = np.where(segments == HISTORY, 0, -1).astype(np.int16)
        return EncodedPrompt(ids, segments, slots, len(target), dropped)

    def completion_ids(self, text: str, terminator: int) -> list[int]:
        """Tokens of a completion with its terminator."""
        return [*self._tokens(text, special=False), terminator]

    def token_labels(self, row: TextRow) -> list[str]:
        """One label per target token of a row whose `group` is a list of spans.

        A token belongs to the span that most of its characters are in; of two equal ones to the first.
        """
        found = self.tokenizer(
            row.completion,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        assert not isinstance(row.group, str) and row.group is not None
        labels = [_covering(row.group, start, stop) for start, stop in found.offset_mapping]
        return [*labels, OUTSIDE]

    def _prompt_ids(self, prompt: Prompt) -> tuple[list[int], list[int], int]:
        """Tokens, segments, and the token that ends the completion."""
        if isinstance(prompt, str) and not self.chat:
            own = self._tokens(prompt, special=True)
            # A prompt without a token cannot predict: the end of a text stands before the next one.
            bos = self._bos or ([] if own else [self.tokenizer.eos_token_id])
            segments = [TEMPLATE] * len(bos) + [HISTORY] * len(own)
            return bos + own, segments, self.tokenizer.eos_token_id
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        *pieces, ending = self.pieces_of(tuple(turn.role for turn in turns))
        ids: list[int] = []
        segments = []
        for piece, turn in zip(pieces, [*turns, None], strict=True):
            literal = self._literal(piece)
            ids += literal
            segments += [TEMPLATE] * len(literal)
            if turn is not None:
                content = self._tokens(turn.content, special=False)
                ids += content
                segments += [HISTORY] * len(content)
        return ids, segments, self._end(ending)

    # -- conversations
    def pieces_of(self, roles: tuple[str, ...]) -> list[str]:
        """The literal texts around the turns of a conversation: before the first, between, before the
        answer, and after it.

        They are found by rendering place holders and cutting at them.

        Raises:
            UserError: the tokenizer has no chat template, or one that changes or reorders turns.
        """
        if roles not in self._pieces:
            self._pieces[roles] = _render(self.tokenizer, roles)
        return self._pieces[roles]

    def _end(self, ending: str) -> int:
        """The token that ends an answer: the special token that follows it, else EOS."""
        text = ending.lstrip()
        for token in self.tokenizer.all_special_tokens:
            if token and text.startswith(token):
                return self.tokenizer.convert_tokens_to_ids(token)
        return self.tokenizer.eos_token_id

    def _literal(self, piece: str) -> list[int]:
        if piece not in self._literals:
            self._literals[piece] = self._tokens(piece, special=True)
        return self._literals[piece]

    def _tokens(self, text: str, special: bool) -> list[int]:
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids

    # -- files
    def _content(self) -> dict[str, Any]:
        pieces = {",".join(roles): texts for roles, texts in sorted(self._pieces.items())}
        return {"style": STYLE, "chat": self.chat, "bos": bool(self._bos), "pieces": pieces}

    def save(self, path: Path) -> None:
        """Writes prompt.json."""
        write_json(path, self._content(), indent=2)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what stands around prompts and completions."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()


def saved_pieces(content: dict[str, Any]) -> dict[tuple[str, ...], list[str]]:
    """The pieces of conversations in the content of a prompt.json."""
    return {tuple(roles.split(",")): texts for roles, texts in content["pieces"].items()}


def _covering(spans: Sequence[Span], start: int, stop: int) -> str:
    best, label = 0, OUTSIDE
    for span in spans:
        shared = min(stop, span.end) - max(start, span.start)
        if shared > best:
            best, label = shared, span.label
    return label


def _render(tokenizer: Any, roles: tuple[str, ...]) -> list[str]:
    """Cuts a rendered conversation of place holders at the place holders."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the data have messages (or prompt.template=chat), and the tokenizer has no chat template",
            "use the tokenizer of a chat model, or give `prompt` and `completion`",
        )
    marks = [f"@@turn{place}@@" for place in range(len(roles) + 1)]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=False)]
    answer = {"role": "assistant", "content": marks[-1]}
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    except Exception as error:  # a template is a program of its author and may raise anything
        raise UserError(
            f"the chat template cannot render turns of {', '.join(roles)}: {error}",
            "correct the order of the roles, or give `prompt` and `completion`",
        ) from None
    pieces = []
    rest = prompt
    for mark in marks[:-1]:
        before, found, rest = rest.partition(mark)
        if not found:
            raise UserError(
                f"the chat template leaves out or reorders turns of {', '.join(roles)}",
                "correct the order of the roles, or give `prompt` and `completion`",
            )
        pieces.append(before)
    _, _, ending = whole.partition(marks[-1])
    return [*pieces, rest, ending]
