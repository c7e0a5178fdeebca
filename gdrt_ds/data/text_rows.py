"""Rows of prompt and completion: the record, and the check that turns one row of a file into it.

A row has `prompt` and `completion` (texts), or `messages` whose last turn is the assistant's. Beside them it
may have

    group              one label, or a list of spans of the completion: start, end (in characters), label
    auxiliary_prompt   the prompt without its evidence (a text, or messages): what relevance is scored on
    choices, answer    the answers among which the completion is one, and which it is (an index)
    user               rows of one user are drawn together when intervals are made
    split              train, valid or test

Every other column is a label of the row: `groups.by=column` takes it, and the evaluation breaks down by it.
`data.columns` gives other names of these columns.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gdrt_ds.errors import UserError, nearest

ROLES = (
    "prompt",
    "completion",
    "messages",
    "group",
    "auxiliary_prompt",
    "choices",
    "answer",
    "user",
    "split",
)
LISTS = ("messages", "auxiliary_prompt", "group", "choices")
"""Roles whose value may be a list."""
SPEAKERS = ("system", "user", "assistant")
MOST_LABEL = 200
"""Characters of a column that counts as a label; longer texts are no labels."""
HALF = "holds half of a character (a surrogate without the other one of its pair)"
"""What is said of a text that is not whole."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Span:
    """Characters `start` (inclusive) to `end` (exclusive) of a completion, and their label."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class TextRow:
    """One row: predict `completion` behind `prompt`.

    Attributes:
        sample_id: its place in its split.
        auxiliary: the prompt without its evidence; None where the row has none.
        group: a label, spans of the completion, or None.
        choices: answers of which `completion` is one; empty where the row lists none.
        answer: which of the choices is right.
        user_id: rows of one user are not independent. By default every row is a user of its own.
        labels: the other columns, as texts.
    """

    sample_id: int
    prompt: Prompt
    completion: str
    auxiliary: Prompt | None = None
    group: str | tuple[Span, ...] | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None
    user_id: str = ""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class TextRows:
    """What a reader of rows returns: the rows of each split, and lines for the user."""

    splits: dict[str, list[TextRow]]
    notes: list[str] = field(default_factory=list)


class BadField(ValueError):
    """A value that cannot be used; `name` is the column as the file calls it."""

    def __init__(self, name: str, problem: str):
        super().__init__(problem)
        self.name = name


class Columns:
    """Which column of the file has which role.

    Args:
        renamed: `data.columns`.

    Raises:
        UserError: an unknown role.
    """

    def __init__(self, renamed: Mapping[str, str]):
        for role in renamed:
            if role not in ROLES:
                raise UserError(f"data.columns.{role}: unknown column role", nearest(role, ROLES))
        self._name = {role: renamed.get(role, role) for role in ROLES}

    def name(self, role: str) -> str:
        """What the file calls the column of a role."""
        return self._name[role]

    def value(self, row: Mapping[str, Any], role: str) -> Any:
        """The value of a role; None where the row has none.

        A list in a cell of a CSV file is written as JSON.
        """
        value = row.get(self._name[role])
        if role in LISTS and isinstance(value, str) and value.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                return json.loads(value)
        return value

    def labels(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The other columns that can be labels: short texts, numbers, true and false."""
        known = set(self._name.values())
        found = {}
        for name, value in row.items():
            is_plain = isinstance(value, (str, int, float, bool))
            if name not in known and is_plain and len(str(value)) <= MOST_LABEL:
                found[name] = _label(value)
        return found

    def are_rows(self, header: Iterable[str]) -> bool:
        """Whether a file with these columns holds rows of prompt and completion, or messages."""
        there = set(header)
        pair = {self._name["prompt"], self._name["completion"]}
        return pair <= there or self._name["messages"] in there


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character.

    JSON can write one half of a pair, as in "\\ud83d", and no tokenizer and no file takes it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def row_of(values: Mapping[str, Any], columns: Columns, number: int) -> TextRow:
    """Checks one row.

    Args:
        number: of the row, which names its user where the row does not.

    Raises:
        BadField: a field that is missing, or a value of another kind.
    """
    prompt, completion = _texts(values, columns)
    choices = _choices(values, columns)
    answer = _answer(values, columns, choices, completion)
    if answer is not None and completion is None:
        completion = choices[answer]
    if not completion:
        raise BadField(columns.name("completion"), "it is missing or empty; a text is expected")
    user = columns.value(values, "user")
    no_user = user is None or user != user or not str(user).strip()  # NaN is how a table writes a gap
    row = TextRow(
        sample_id=0,
        prompt=prompt,
        completion=completion,
        auxiliary=_auxiliary(values, columns),
        group=_group(values, columns, completion),
        choices=choices,
        answer=answer,
        user_id=f"row {number}" if no_user else _label(user),
        labels=columns.labels(values),
    )
    for role, texts in _roles_of(row).items():
        if not all(map(is_whole, texts)):
            raise BadField(columns.name(role), f"it {HALF}")
    return row


def _roles_of(row: TextRow) -> dict[str, list[str]]:
    """The texts of a row that become tokens or names of groups, by their role."""
    spans = [row.group] if isinstance(row.group, str) else [span.label for span in row.group or ()]
    texts = {"completion": [row.completion], "choices": list(row.choices), "group": spans}
    for role, prompt in (("prompt", row.prompt), ("auxiliary_prompt", row.auxiliary or "")):
        if isinstance(prompt, str):
            texts[role] = [prompt]
        else:
            texts.setdefault("messages", []).extend(turn.content for turn in prompt)
    if not isinstance(row.prompt, str):  # its last turn is the completion
        texts["messages"] += texts.pop("completion")
    return texts


def _texts(values: Mapping[str, Any], columns: Columns) -> tuple[Prompt, str | None]:
    """The prompt and the completion; None where the choices and the answer have to give it."""
    messages = columns.value(values, "messages")
    if messages is not None:
        turns = _messages(messages, columns.name("messages"))
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise BadField(
                columns.name("messages"),
                "its last turn must be the assistant's, which is the completion, behind at least one other",
            )
        return turns[:-1], turns[-1].content
    prompt = columns.value(values, "prompt")
    if not isinstance(prompt, str) or not prompt:
        raise BadField(columns.name("prompt"), f"{_found(prompt)}; a text is expected (or `messages`)")
    completion = columns.value(values, "completion")
    if completion is not None and not isinstance(completion, str):
        raise BadField(columns.name("completion"), f"{_found(completion)}; a text is expected")
    return prompt, completion


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise BadField(name, f'{_found(value)}; a list of {{"role": ..., "content": ...}} is expected')
    turns = []
    for place, turn in enumerate(value):
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in SPEAKERS:
            raise BadField(name, f"turn {place + 1} has the role {role!r}; one of {', '.join(SPEAKERS)}")
        if not isinstance(content, str):
            raise BadField(name, f"turn {place + 1} has no content that is a text")
        turns.append(Message(role, content))
    return tuple(turns)


def _auxiliary(values: Mapping[str, Any], columns: Columns) -> Prompt | None:
    value = columns.value(values, "auxiliary_prompt")
    if value is None or isinstance(value, str):
        return value
    return _messages(value, columns.name("auxiliary_prompt"))


def _group(values: Mapping[str, Any], columns: Columns, completion: str) -> str | tuple[Span, ...] | None:
    value = columns.value(values, "group")
    if value is None or value == "":
        return None
    if not isinstance(value, (list, tuple)):
        if isinstance(value, (str, int, float, bool)):
            return _label(value)
        raise BadField(columns.name("group"), f"{_found(value)}; a label or a list of spans is expected")
    return tuple(
        sorted((_span(span, columns.name("group"), completion) for span in value), key=lambda s: s.start)
    )


def _span(value: Any, name: str, completion: str) -> Span:
    keys = ("start", "end", "label")
    if not isinstance(value, Mapping) or any(value.get(key) is None for key in keys):
        raise BadField(name, f'{_found(value)} is no span; {{"start": int, "end": int, "label": str}}')
    start, end = value["start"], value["end"]
    whole = all(isinstance(place, int) and not isinstance(place, bool) for place in (start, end))
    if not whole or not 0 <= start < end <= len(completion):
        raise BadField(
            name,
            f"the span {start!r} to {end!r} is outside the completion of {len(completion)} characters, or "
            "empty",
        )
    return Span(start, end, _label(value["label"]))


def _choices(values: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    value = columns.value(values, "choices")
    if value is None:
        return ()
    texts = isinstance(value, (list, tuple)) and all(isinstance(text, str) and text for text in value)
    if not texts or len(value) < 2:
        raise BadField(columns.name("choices"), f"{_found(value)}; a list of at least two texts is expected")
    if len(set(value)) < len(value):
        raise BadField(columns.name("choices"), "an answer is listed twice")
    return tuple(value)


def _answer(
    values: Mapping[str, Any], columns: Columns, choices: tuple[str, ...], completion: str | None
) -> int | None:
    """Which choice is right: the field `answer`, else the choice that is the completion."""
    value = columns.value(values, "answer")
    if isinstance(value, str) and value.isdecimal():  # every cell of a CSV file is a text
        value = int(value)
    if value is not None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not 0 <= value < len(choices):
            raise BadField(
                columns.name("answer"), f"{_found(value)}; an index of the {len(choices)} choices, from 0"
            )
        if completion is not None and completion != choices[value]:
            raise BadField(columns.name("answer"), "it names another choice than the completion")
        return value
    if not choices:
        return None
    if completion not in choices:
        raise BadField(columns.name("choices"), "the completion is none of them, and there is no `answer`")
    return choices.index(completion)


def _label(value: Any) -> str:
    """A label as text; 3.0 and 3 are the same label, as a table library may widen a column with gaps."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _found(value: Any) -> str:
    """What was found, short enough for a message."""
    if value is None:
        return "it is missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
