"""Prompts: one template for training and evaluation, encoded piece by piece so that every token's segment
is exact.

A prompt is   [BOS] before_instruction | instruction | before_history | item, separator, item, ... |
after_history | target terminator.
Every piece is tokenised alone (special tokens are added by us, never by the tokenizer), so the tokens
before the history are the same for every user, and a title's target tokens do not depend on the prompt:
the catalogue trie is built from them once.
`PromptTemplate` is saved as prompt.json in the run folder; evaluation reads that file. Segments: `SEGMENTS`.
Shapes: T tokens of one sample, n samples of a split.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gdrt_ds.config import PromptSection
from gdrt_ds.data.catalogue import Catalogue
from gdrt_ds.data.corpus import Sample
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.files import REPOSITORY

SEGMENTS = ("instruction", "template", "history", "target")
INSTRUCTION, TEMPLATE, HISTORY, TARGET = range(4)
STYLES = ("alpaca", "plain", "chat")


@dataclass(frozen=True)
class PromptTemplate:
    """The literal pieces of a prompt. `{title}` stands for the title in `item_format` and `target_format`.

    `bos`: the sequence begins with the tokenizer's BOS token (true where the tokenizer itself adds it to
    plain text).
    `terminator`: text of the one special token that ends the target; null = the tokenizer's EOS.
    """

    style: str
    domain: str
    before_instruction: str
    instruction: str
    before_history: str
    after_history: str
    item_format: str = ' "{title}"'
    separator: str = ","
    target_format: str = '"{title}"'
    bos: bool = False
    terminator: str | None = None

    @classmethod
    def from_config(cls, prompt: PromptSection, domain: str, tokenizer) -> PromptTemplate:
        """The template that `prompt.template` names, for this domain and tokenizer.

        Raises:
            UserError: unknown style, unreadable or incomplete JSON file, tokenizer without EOS or without
            a chat template.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every target",
                "set model.tokenizer to one that has an eos_token",
            )
        domain = prompt.domain or domain
        bos = _adds_bos(tokenizer)
        if prompt.template in ("alpaca", "plain"):
            return cls(prompt.template, domain, **_wording(prompt.template, domain), bos=bos)
        if prompt.template == "chat":
            return _chat_template(domain, tokenizer)
        if prompt.template.endswith(".json"):
            return cls.load(_template_file(prompt.template), {"style": "file", "domain": domain, "bos": bos})
        raise UserError(
            f"prompt.template={prompt.template}: unknown template",
            f"{nearest(prompt.template, STYLES)} Or give a JSON file of a template",
        )

    def save(self, path: str | Path) -> None:
        """Writes prompt.json."""
        Path(path).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, defaults: dict | None = None) -> PromptTemplate:
        """Reads what `save` wrote, or a template file written by hand, where `defaults` fill what it
        leaves out.

        Raises:
            UserError: missing file, not JSON, unknown or missing or wrongly typed field, a format without
            `{title}`.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"prompt template {path}: cannot be read: {error.strerror or error}",
                "give the prompt.json of a run, or your own file",
            ) from None
        except ValueError as error:
            raise UserError(
                f"prompt template {path}: not valid JSON: {error}",
                "see the prompt.json of any run for an example",
            ) from None
        if not isinstance(fields, dict):
            raise UserError(
                f"prompt template {path}: expected an object of pieces",
                "see the prompt.json of any run for an example",
            )
        fields = {**(defaults or {}), **fields}
        known = list(cls.__dataclass_fields__)
        for name, value in fields.items():
            if name not in known:
                raise UserError(f"prompt template {path}: unknown field `{name}`", nearest(name, known))
            if not isinstance(value, bool if name == "bos" else str) and not (
                name == "terminator" and value is None
            ):
                raise UserError(
                    f"prompt template {path}: {name}={value!r}: expected "
                    f"{'true or false' if name == 'bos' else 'text'}",
                    "correct the field",
                )
        missing = [name for name in known[:6] if name not in fields]
        if missing:
            raise UserError(
                f"prompt template {path}: missing {', '.join(missing)}",
                "see the prompt.json of any run for an example",
            )
        template = cls(**fields)
        for name in ("item_format", "target_format"):
            if getattr(template, name).count("{title}") != 1:
                raise UserError(
                    f"prompt template {path}: {name}={getattr(template, name)!r}: `{{title}}` must be there "
                    "once",
                    'for example "{title}"',
                )
        return template

    @property
    def fingerprint(self) -> str:
        """sha256 of all pieces."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _template_file(path: str) -> Path:
    """A relative path counts from where the command runs, else from the checkout, like `deepspeed`."""
    shipped = REPOSITORY / path
    return shipped if not Path(path).is_file() and shipped.is_file() else Path(path)


def _wording(style: str, domain: str) -> dict[str, str]:
    """Our own wording. Pieces end at line ends and colons, where byte-level tokenizers break anyway; of a
    whole text they would merge only a title's closing quote with the comma after it."""
    if style == "plain":
        return {
            "before_instruction": "",
            "instruction": f"Predict the next {domain} of this user.",
            "before_history": f"\nThe {domain} history, oldest first:",
            "after_history": f"\nThe next {domain}: ",
        }
    return {
        "before_instruction": "### Instruction:\n",
        "instruction": (
            f"Here is what a user chose in the past. Recommend the {domain} that this user will choose "
            "next, by its title."
        ),
        "before_history": f"\n\n### Input:\nThe user's {domain} history, oldest first:",
        "after_history": "\n\n### Response:\n",
    }


def _adds_bos(tokenizer) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _chat_template(domain: str, tokenizer) -> PromptTemplate:
    """Pieces of the tokenizer's chat template, found by rendering a conversation of place holders and cutting
    it at them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "prompt.template=chat: the tokenizer has no chat template",
            "use prompt.template=alpaca, or the tokenizer of a chat model",
        )
    words = _wording("alpaca", domain)
    marks = [f"@@{name}@@" for name in ("instruction", "history", "answer")]
    before_history = f"\n\nThe user's {domain} history, oldest first:"
    user = {"role": "user", "content": f"{marks[0]}{before_history}{marks[1]}"}
    try:
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(
            [user, {"role": "assistant", "content": marks[2]}], tokenize=False
        )
    except Exception as error:  # a template is a program of its author and may raise anything
        raise UserError(
            f"prompt.template=chat: the chat template cannot render a user message: {error}",
            "use prompt.template=alpaca",
        ) from None
    head, found_instruction, rest = prompt.partition(marks[0])
    middle, found_history, tail = rest.partition(marks[1])
    answered, found_answer, ending = whole.partition(marks[2])
    if not (found_instruction and found_history and found_answer) or middle != before_history:
        raise UserError(
            "prompt.template=chat: the chat template changes the user's message, so its pieces cannot be "
            "found",
            "use prompt.template=alpaca",
        )
    special = next(
        (token for token in tokenizer.all_special_tokens if token and ending.lstrip().startswith(token)), None
    )
    bos = tokenizer.bos_token is not None and head.startswith(tokenizer.bos_token) and _adds_bos(tokenizer)
    return PromptTemplate(
        "chat",
        domain,
        head.removeprefix(tokenizer.bos_token) if bos else head,
        words["instruction"],
        before_history,
        tail,
        bos=bos,
        terminator=special,
    )


@dataclass
class EncodedPrompt:
    """One sample. The target, if any, is the last `num_target` tokens (terminator included)."""

    input_ids: np.ndarray  # int32[T]
    segments: np.ndarray  # int8[T], index into SEGMENTS
    item_slot: np.ndarray  # int16[T]: which history item (0 = oldest kept), -1 elsewhere
    num_target: int
    num_dropped: int  # history items left out for length, oldest first


class PromptEncoder:
    """Turns titles into tokens with segments.

    Args:
        template: the pieces.
        tokenizer: of transformers; a fast one.
        max_length: tokens of a whole example.

    Raises:
        UserError: the tokenizer has no EOS, or the template alone is longer than max_length.
    """

    def __init__(self, template: PromptTemplate, tokenizer, max_length: int):
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every target",
                "set model.tokenizer to one that has an eos_token",
            )
        self.template, self.tokenizer, self.max_length = template, tokenizer, max_length
        self._reserved = 0
        self._items: dict[str, list[int]] = {}
        self._targets: dict[str, list[int]] = {}

        def piece(text):
            return self._tokens([text], special=True)[0] if text else []

        self._bos = [tokenizer.bos_token_id] if template.bos else []
        if template.bos and tokenizer.bos_token_id is None:
            raise UserError(
                "the prompt template begins with BOS and the tokenizer has none",
                "use the tokenizer that the template was made with",
            )
        self._before_instruction, self._instruction = (
            piece(template.before_instruction),
            piece(template.instruction),
        )
        self._before_history, self._separator = piece(template.before_history), piece(template.separator)
        self._after_history = piece(template.after_history)
        self._terminator = (
            tokenizer.eos_token_id
            if template.terminator is None
            else tokenizer.convert_tokens_to_ids(template.terminator)
        )
        if self._terminator is None or (
            template.terminator is not None and self._terminator == tokenizer.unk_token_id
        ):
            raise UserError(
                f"the prompt template ends targets with {template.terminator!r}, which the tokenizer does "
                "not know",
                "use the tokenizer that the template was made with",
            )
        if len(self.prefix_ids) + len(self._after_history) >= max_length:
            raise UserError(
                f"prompt.max_length={max_length}: the template alone has "
                f"{len(self.prefix_ids) + len(self._after_history)} tokens",
                "raise prompt.max_length or shorten the template",
            )

    @property
    def prefix_ids(self) -> list[int]:
        """Everything before the first history token; the same for every sample."""
        return self._bos + self._before_instruction + self._instruction + self._before_history

    def warm(self, titles: list[str]) -> None:
        """Tokenises many titles at once, as history items and as targets (much faster than one by one)."""
        template = self.template
        new = [t for t in dict.fromkeys(titles) if t not in self._items]
        self._items.update(zip(new, self._tokens([template.item_format.replace("{title}", t) for t in new])))
        new = [t for t in dict.fromkeys(titles) if t not in self._targets]
        for title, ids in zip(new, self._tokens([template.target_format.replace("{title}", t) for t in new])):
            if self._terminator in ids:
                raise UserError(
                    f"title {title!r}: its tokens contain the one that ends a target",
                    "use another tokenizer, or correct the title",
                )
            self._targets[title] = ids + [self._terminator]

    def reserve_for(self, catalogue: Catalogue) -> None:
        """Keeps room for the longest title, so that a sample's history is cut alike in training (with its
        target) and in scoring (before any title).

        Raises:
            UserError: a title does not fit into max_length even without history.
        """
        self.warm([entry.text for entry in catalogue.entries])
        longest = max(catalogue.entries, key=lambda entry: len(self._targets[entry.text]))
        self._check_target(longest.text)
        self._reserved = len(self._targets[longest.text])

    def target_ids(self, title: str) -> list[int]:
        """The formatted title and the terminator; what the catalogue trie is built from."""
        if title not in self._targets:
            self.warm([title])
        return self._targets[title]

    def encode(
        self,
        history_titles: list[str] | tuple[str, ...],
        target_text: str | None = None,
        mask_history: bool = False,
        blank_instruction: bool = False,
    ) -> EncodedPrompt:
        """Encodes one sample; without `target_text`, the prompt up to where the target would begin.

        Args:
            history_titles: oldest first; too long, the oldest are left out (`num_dropped`), never the target.
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
        # The full instruction counts even when blanked, so that the audits compare the same history.
        room = (
            self.max_length
            - len(self.prefix_ids)
            - len(self._after_history)
            - max(len(target), self._reserved)
        )
        first = len(titles)
        while first > 0:
            cost = len(self._items[titles[first - 1]]) + (len(self._separator) if first < len(titles) else 0)
            if cost > room:
                break
            room -= cost
            first -= 1
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

    def pieces(self, encoded: EncodedPrompt) -> list[tuple[str, int, str]]:
        """(segment name, item slot or -1, text) of each run of tokens, for audits and reports."""
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


@dataclass
class TokenStore:
    """A tokenised split, flat. Targets are the last `num_target[i]` tokens of sample i; the label of
    position t is token t + 1, so the supervised positions of a sample of length T are T - num_target - 1
    .. T - 2.
    """

    input_ids: np.ndarray  # int32[sum T]
    offsets: np.ndarray  # int64[n + 1]: sample i is input_ids[offsets[i]:offsets[i + 1]]
    segments: np.ndarray  # int8[sum T]
    num_target: np.ndarray  # int32[n]
    target_offsets: np.ndarray  # int64[n + 1]: prefix sums of num_target

    def __len__(self) -> int:
        return len(self.num_target)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64[n]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """sha256 of tokens, segments and target lengths."""
        digest = hashlib.sha256()
        for array in (self.input_ids, self.offsets, self.segments, self.num_target):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def tokenise_split(
    encoder: PromptEncoder, catalogue: Catalogue, samples: list[Sample], mask_history: bool = False
) -> tuple[TokenStore, list[str]]:
    """Tokenises samples with their targets.

    Returns:
        the store, and notes that count what had to be left out for length.

    Raises:
        UserError: a catalogue title does not fit into prompt.max_length.
    """
    encoder.reserve_for(catalogue)
    encoded = [
        encoder.encode(
            [catalogue.text_of(item) for item in s.history], catalogue.text_of(s.target), mask_history
        )
        for s in samples
    ]

    def sums(values):
        return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)

    num_target = np.asarray([e.num_target for e in encoded], np.int32)

    def join(arrays, dtype):
        return np.concatenate(arrays) if arrays else np.zeros(0, dtype)

    store = TokenStore(
        join([e.input_ids for e in encoded], np.int32),
        sums([len(e.input_ids) for e in encoded]),
        join([e.segments for e in encoded], np.int8),
        num_target,
        sums(num_target),
    )
    cut = [e.num_dropped for e in encoded if e.num_dropped]
    notes = []
    if cut:
        notes.append(
            f"{len(cut)} of {len(samples)} samples exceed prompt.max_length={encoder.max_length}: "
            f"their {sum(cut)} oldest history items are left out"
        )
    return store, notes


def template_texts(prompt: PromptSection, domain: str) -> list[str]:
    """The literal texts of a template before any tokenizer exists: what a word-level tokenizer must know."""
    if prompt.template.endswith(".json"):
        template = PromptTemplate.load(
            _template_file(prompt.template), {"style": "file", "domain": prompt.domain or domain}
        )
        return [
            template.before_instruction,
            template.instruction,
            template.before_history,
            template.after_history,
            template.separator,
        ]
    style = prompt.template if prompt.template in STYLES else "alpaca"
    return list(_wording(style, prompt.domain or domain).values())
