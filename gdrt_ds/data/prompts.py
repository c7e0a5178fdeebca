"""Samples as tokens: prompts are encoded piece by piece, so that every token's segment is exact.

The pieces are those of a template (templates.py). Every piece is tokenised alone, and special tokens are
added here, never by the tokenizer. So the tokens before the history are the same for every user, and a
title's target tokens do not depend on the prompt: the catalogue trie is built from them once.

Segments are those of `SEGMENTS`. Shapes: T tokens of one sample, n samples of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.templates import PromptTemplate
from gdrt_ds.errors import UserError

SEGMENTS = ("instruction", "template", "history", "target")
INSTRUCTION, TEMPLATE, HISTORY, TARGET = range(4)


@dataclass
class EncodedPrompt:
    """One sample. The target, if there is one, is the last `num_target` tokens, terminator included."""

    input_ids: np.ndarray  # int32[T]
    segments: np.ndarray  # int8[T], index into SEGMENTS
    item_slot: np.ndarray  # int16[T]: which history item (0 = oldest kept), -1 elsewhere
    num_target: int
    num_dropped: int  # history items left out for length, oldest first


@dataclass(frozen=True)
class PromptPieces:
    """What the samples of a catalogue are put together from; lists of token ids.

    Attributes:
        start: everything before the first history token. start_segments: their segments.
        separator: between two items of a history.
        after: what stands behind the history.
        items, targets: each title as a history item, and as a target with its terminator.
        room: tokens that a history may take, its separators included.
    """

    start: list[int]
    start_segments: list[int]
    separator: list[int]
    after: list[int]
    items: list[list[int]]
    targets: list[list[int]]
    room: int


class PromptEncoder:
    """Turns titles into tokens with segments.

    Args:
        template: the pieces.
        tokenizer: of transformers; a fast one.
        max_length: tokens of a whole example.

    Raises:
        UserError: the tokenizer has no EOS or drops the separator, or the template alone is longer than
            max_length.
    """

    def __init__(self, template: PromptTemplate, tokenizer, max_length: int):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every target",
                "set model.tokenizer to one that has an eos_token",
            )
        self.template = template
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._reserved = 0
        self._items: dict[str, list[int]] = {}
        self._targets: dict[str, list[int]] = {}
        if template.bos and tokenizer.bos_token_id is None:
            raise UserError(
                "the prompt template begins with BOS and the tokenizer has none",
                "use the tokenizer that the template was made with",
            )
        self._bos = [tokenizer.bos_token_id] if template.bos else []
        self._before_instruction = self._piece(template.before_instruction)
        self._instruction = self._piece(template.instruction)
        self._before_history = self._piece(template.before_history)
        self._separator = self._piece(template.separator)
        if template.separator and not self._separator:
            raise UserError(
                f"the tokenizer has no token for the separator {template.separator!r} of the prompt "
                "template, so the titles of a history would run together",
                "use a template with another separator, e.g. prompt.template=configs/prompts/short_list.json",
            )
        self._after_history = self._piece(template.after_history)
        self._terminator = _terminator_of(template, tokenizer)
        length = len(self.prefix_ids) + len(self._after_history)
        if length >= max_length:
            raise UserError(
                f"prompt.max_length={max_length}: the template alone has {length} tokens",
                "raise prompt.max_length or shorten the template",
            )

    def _piece(self, text: str) -> list[int]:
        """Tokens of a literal piece of the template, which may hold special tokens."""
        if not text:
            return []
        return self._tokens([text], special=True)[0]

    @property
    def prefix_ids(self) -> list[int]:
        """Everything before the first history token; the same for every sample."""
        return self._bos + self._before_instruction + self._instruction + self._before_history

    def warm(self, titles: list[str]) -> None:
        """Tokenises many titles at once, as history items and as targets: much faster than one by one.

        Raises:
            UserError: a title holds the token that ends a target.
        """
        new = [title for title in dict.fromkeys(titles) if title not in self._items]
        texts = [self.template.item_format.replace("{title}", title) for title in new]
        self._items.update(zip(new, self._tokens(texts)))
        new = [title for title in dict.fromkeys(titles) if title not in self._targets]
        texts = [self.template.target_format.replace("{title}", title) for title in new]
        for title, ids in zip(new, self._tokens(texts)):
            if self._terminator in ids:
                raise UserError(
                    f"title {title!r}: its tokens contain the one that ends a target",
                    "use another tokenizer, or correct the title",
                )
            self._targets[title] = ids + [self._terminator]

    def reserve_for(self, catalogue: Catalogue) -> None:
        """Keeps room for the longest title of the catalogue.

        So a sample's history is cut alike in training (with its target) and in scoring (before any title).

        Raises:
            UserError: a title does not fit into max_length even without history.
        """
        self.warm([entry.text for entry in catalogue.entries])
        longest = max(catalogue.entries, key=lambda entry: len(self._targets[entry.text]))
        self._check_target(longest.text)
        self._reserved = len(self._targets[longest.text])

    def forget(self, titles: Iterable[str]) -> None:
        """Drops the kept tokens of titles: a service that is asked for ever new ones must not grow."""
        for title in titles:
            self._items.pop(title, None)
            self._targets.pop(title, None)

    def target_ids(self, title: str) -> list[int]:
        """Returns the formatted title and the terminator: what the catalogue trie is built from."""
        if title not in self._targets:
            self.warm([title])
        return self._targets[title]

    def pieces_of(self, titles: list[str]) -> PromptPieces:
        """Returns what `encode` lays together, for prompts over these titles; call `reserve_for` before."""
        self.warm(titles)
        before = self._bos + self._before_instruction
        segments = [TEMPLATE] * len(before) + [INSTRUCTION] * len(self._instruction)
        return PromptPieces(
            self.prefix_ids,
            segments + [TEMPLATE] * len(self._before_history),
            self._separator,
            self._after_history,
            [self._items[title] for title in titles],
            [self._targets[title] for title in titles],
            self._room(0),
        )

    def encode(
        self,
        history_titles: list[str] | tuple[str, ...],
        target_text: str | None = None,
        mask_history: bool = False,
        blank_instruction: bool = False,
    ) -> EncodedPrompt:
        """Encodes one sample; without `target_text`, the prompt up to where the target would begin.

        Args:
            history_titles: oldest first. Where the prompt is too long, the oldest are left out
                (`num_dropped`), never the target.
            target_text: title of the target.
            mask_history: the titles and their separators are removed, the template stays.
            blank_instruction: the instruction text is removed, the template stays.

        Raises:
            UserError: the target alone does not fit.
        """
        titles = () if mask_history else tuple(history_titles)
        missing = [title for title in titles if title not in self._items]
        if missing:
            self.warm(missing)
        target = []
        if target_text is not None:
            target = self.target_ids(target_text)
            self._check_target(target_text)
        instruction = [] if blank_instruction else self._instruction
        first = self._first_kept(titles, len(target))
        ids: list[int] = []
        segments: list[int] = []
        slots: list[int] = []

        def add(tokens: list[int], segment: int, slot: int = -1) -> None:
            ids.extend(tokens)
            segments.extend([segment] * len(tokens))
            slots.extend([slot] * len(tokens))

        add(self._bos + self._before_instruction, TEMPLATE)
        add(instruction, INSTRUCTION)
        add(self._before_history, TEMPLATE)
        for slot, title in enumerate(titles[first:]):
            if slot:
                add(self._separator, TEMPLATE)
            add(self._items[title], HISTORY, slot)
        add(self._after_history, TEMPLATE)
        add(target, TARGET)
        return EncodedPrompt(
            np.asarray(ids, np.int32),
            np.asarray(segments, np.int8),
            np.asarray(slots, np.int16),
            len(target),
            first,
        )

    def encode_newest(self, titles: list[str], most: int) -> EncodedPrompt:
        """Encodes the prompt for the newest `most` titles (`data.history_length`), as windows are made.

        Args:
            titles: oldest first. `num_dropped` counts all that are left out, the older ones among them.
        """
        kept = titles[-most:]
        encoded = self.encode(kept)
        return replace(encoded, num_dropped=encoded.num_dropped + len(titles) - len(kept))

    def _first_kept(self, titles: tuple[str, ...], num_target: int) -> int:
        """Index of the oldest title that still fits; titles before it are left out."""
        room = self._room(num_target)
        first = len(titles)
        while first > 0:
            cost = len(self._items[titles[first - 1]])
            if first < len(titles):
                cost += len(self._separator)
            if cost > room:
                break
            room -= cost
            first -= 1
        return first

    def _room(self, num_target: int) -> int:
        """Tokens that a history may take before a target of so many tokens."""
        # The full instruction counts even when blanked, so that the audits compare the same history.
        fixed = len(self.prefix_ids) + len(self._after_history)
        return self.max_length - fixed - max(num_target, self._reserved)

    def pieces(self, encoded: EncodedPrompt) -> list[tuple[str, int, str]]:
        """Returns (segment name, item slot or -1, text) of each run of tokens, for audits and reports."""
        runs: list[tuple[str, int, str]] = []
        change = np.flatnonzero((np.diff(encoded.segments) != 0) | (np.diff(encoded.item_slot) != 0)) + 1
        bounds = [0, *change.tolist(), len(encoded.input_ids)]
        for start, stop in zip(bounds, bounds[1:]):
            if stop > start:
                text = self.tokenizer.decode(
                    encoded.input_ids[start:stop].tolist(), skip_special_tokens=False
                )
                runs.append((SEGMENTS[encoded.segments[start]], int(encoded.item_slot[start]), text))
        return runs

    def _check_target(self, title: str) -> None:
        needed = len(self.prefix_ids) + len(self._after_history) + len(self._targets[title])
        if needed > self.max_length:
            raise UserError(
                f"prompt.max_length={self.max_length}: the template and the target {title[:80]!r} alone "
                f"have {needed} tokens",
                f"set prompt.max_length to at least {needed}, or shorten the title",
            )

    def _tokens(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Tokens of each text alone. Only template pieces may hold special tokens.

        In a title their text is ordinary text.
        """
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not special).input_ids


def _terminator_of(template: PromptTemplate, tokenizer) -> int:
    """Id of the token that ends a target."""
    if template.terminator is None:
        return tokenizer.eos_token_id
    found = tokenizer.convert_tokens_to_ids(template.terminator)
    if found is None or found == tokenizer.unk_token_id:
        raise UserError(
            f"the prompt template ends targets with {template.terminator!r}, which the tokenizer does not "
            "know",
            "use the tokenizer that the template was made with",
        )
    return found


@dataclass
class TokenStore:
    """A tokenised split, flat.

    Targets are the last `num_target[i]` tokens of sample i. The label of position t is token t + 1, so the
    supervised positions of a sample of length T are T - num_target - 1 .. T - 2.
    """

    input_ids: np.ndarray  # int32[sum T]
    offsets: np.ndarray  # int64[n + 1]: sample i is input_ids[offsets[i]:offsets[i + 1]]
    segments: np.ndarray  # int8[sum T]
    num_target: np.ndarray  # int32[n]
    target_offsets: np.ndarray  # int64[n + 1]: prefix sums of num_target

    def __len__(self) -> int:
        return len(self.num_target)

    def order(self, epoch: int) -> np.ndarray | None:
        """Returns the rows of an epoch in order, where the data decide it; None = any order will do."""
        return None

    @property
    def rows_change(self) -> bool:
        """Whether a sample has another row in every epoch; then `lengths` and `offsets` are not its rows'."""
        return False

    def sample_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the samples that rows belong to. Here a row is a sample; see `growing.GrowingStore`."""
        return np.asarray(rows)

    def row(self, sample: int) -> np.ndarray:
        """Tokens of one sample, its target included, int32[T]."""
        return self.input_ids[self.offsets[sample] : self.offsets[sample + 1]]

    def rows(self, samples: Iterable[int]) -> list[np.ndarray]:
        """The same of several samples, in their order."""
        return [self.row(int(sample)) for sample in samples]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64[n]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, segments and target lengths."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.offsets, self.segments, self.num_target):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def store_of(encoded: list[EncodedPrompt]) -> TokenStore:
    """Returns samples, each with its target, as one store."""
    num_target = np.asarray([e.num_target for e in encoded], np.int32)
    return TokenStore(
        _joined([e.input_ids for e in encoded], np.int32),
        _offsets([len(e.input_ids) for e in encoded]),
        _joined([e.segments for e in encoded], np.int8),
        num_target,
        _offsets(num_target),
    )


def common_head(store: TokenStore) -> int:
    """Returns how many tokens all prompts begin with, their last token left out.

    The last prompt token predicts the first target token, so each sample has its own copy of it. The prompts
    of a catalogue's titles are all the same, so there the head is the whole prompt but its last token.
    """
    constant = getattr(store, "constant_prompt", None)
    if constant is not None:
        return constant - 1
    prompts = store.lengths - store.num_target
    first = store.row(0)[: int(prompts.min()) - 1]
    common = len(first)
    for sample in range(1, len(store)):
        differs = np.flatnonzero(store.row(sample)[:common] != first[:common])
        if len(differs):
            common = int(differs[0])
    return common


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    if not arrays:
        return np.zeros(0, dtype)
    return np.concatenate(arrays)


def _offsets(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Prefix sums with a leading zero, int64[n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
