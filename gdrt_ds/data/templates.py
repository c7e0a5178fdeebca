"""Prompt templates: the literal pieces of a prompt, by style or from a file, and prompt.json.

A prompt is

    [BOS] before_instruction | instruction | before_history | item, separator, item, ... | after_history

and the target with its terminator follows. A run saves its template as prompt.json, which evaluation reads:
one template serves training and evaluation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdrt_ds.config import PromptSection
from gdrt_ds.errors import UserError, nearest
from gdrt_ds.files import preset_names, preset_path, write_json

WORDED = ("alpaca", "plain", "list")
"""Styles whose wording is ours."""

STYLES = (*WORDED, "chat")
REQUIRED = (
    "style",
    "domain",
    "before_instruction",
    "instruction",
    "before_history",
    "after_history",
)
EXAMPLE = "see the prompt.json of any run for an example"


@dataclass(frozen=True)
class PromptTemplate:
    """The literal pieces of a prompt. `{title}` stands for the title in `item_format` and `target_format`.

    Attributes:
        style: `alpaca`, `plain`, `list`, `chat` or `file`.
        domain: what is recommended, e.g. `movie`.
        bos: the sequence begins with the tokenizer's BOS token. It is true where the tokenizer itself adds
            BOS to plain text.
        terminator: text of the one special token that ends the target; None is the tokenizer's EOS.
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
        """Returns the template that `prompt.template` names, for this domain and tokenizer.

        Raises:
            UserError: unknown style, unreadable or incomplete JSON file, tokenizer without EOS or without a
                chat template.
        """
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no EOS token, which ends every target",
                "set model.tokenizer to one that has an eos_token",
            )
        domain = prompt.domain or domain
        bos = adds_bos(tokenizer)
        if prompt.template in WORDED:
            return cls(prompt.template, domain, **_wording(prompt.template, domain), bos=bos)
        if prompt.template == "chat":
            return _chat_template(domain, tokenizer)
        if prompt.template.endswith(".json"):
            return cls.load(preset_path(prompt.template), {"style": "file", "domain": domain, "bos": bos})
        raise UserError(
            f"prompt.template={prompt.template}: unknown template",
            f"{nearest(prompt.template, STYLES)} Or give a JSON file of a template",
        )

    def save(self, path: str | Path) -> None:
        """Writes prompt.json."""
        write_json(Path(path), asdict(self), indent=2)

    @classmethod
    def load(cls, path: str | Path, defaults: dict[str, Any] | None = None) -> PromptTemplate:
        """Reads what `save` wrote, or a template file written by hand.

        Args:
            path: the file.
            defaults: pieces that a file written by hand may leave out.

        Raises:
            UserError: missing file, not JSON, unknown or missing or wrongly typed field, a format without
                `{title}`.
        """
        fields = {**(defaults or {}), **_read_pieces(path)}
        for name, value in fields.items():
            _check_piece(path, name, value, list(cls.__dataclass_fields__))
        missing = [name for name in REQUIRED if name not in fields]
        if missing:
            raise UserError(f"prompt template {path}: missing {', '.join(missing)}", EXAMPLE)
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
        """SHA-256 of all pieces."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _read_pieces(path: str | Path) -> dict[str, Any]:
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"prompt template {path}: cannot be read: {error.strerror or error}",
            "give the prompt.json of a run, a file of your own, or a shipped one: "
            + ", ".join(preset_names("configs/prompts", ".json")),
        ) from None
    except ValueError as error:
        raise UserError(f"prompt template {path}: not valid JSON: {error}", EXAMPLE) from None
    if not isinstance(fields, dict):
        raise UserError(f"prompt template {path}: expected an object of pieces", EXAMPLE)
    return fields


def _check_piece(path: str | Path, name: str, value: Any, known: list[str]) -> None:
    """Raises UserError for an unknown field, or a value of another type than the field's."""
    if name not in known:
        raise UserError(f"prompt template {path}: unknown field `{name}`", nearest(name, known))
    if name == "terminator" and value is None:
        return
    kind = bool if name == "bos" else str
    if not isinstance(value, kind):
        words = "true or false" if name == "bos" else "text"
        raise UserError(f"prompt template {path}: {name}={value!r}: expected {words}", "correct the field")


def _wording(style: str, domain: str) -> dict[str, str]:
    """Our own pieces of a style.

    Pieces end at line ends and colons, where byte-level tokenizers break anyway. Of a whole text they would
    merge only a title's closing quote with the comma after it.
    """
    if style == "list":
        # An item, the separator and the target are the same tokens wherever they stand. So a target is
        # already the next sample's history, and growing windows compute each title once (docs/windows.md).
        return {
            "before_instruction": "",
            "instruction": (
                f"Continue the list with the title of the {domain} that this user will choose next."
            ),
            "before_history": f"\n\nThe user's {domain} history, oldest first:\n",
            "after_history": "\n",
            "item_format": "{title}",
            "separator": "\n",
            "target_format": "{title}",
        }
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


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts its BOS token before plain text."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _chat_template(domain: str, tokenizer) -> PromptTemplate:
    """Returns the pieces of the tokenizer's chat template.

    They are found by rendering a conversation of place holders and cutting it at them.
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
    answer = {"role": "assistant", "content": marks[2]}
    try:
        prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    except Exception as error:  # a template is a program of its author and may raise anything
        raise UserError(
            f"prompt.template=chat: the chat template cannot render a user message: {error}",
            "use prompt.template=alpaca",
        ) from None
    head, found_instruction, rest = prompt.partition(marks[0])
    middle, found_history, tail = rest.partition(marks[1])
    _, found_answer, ending = whole.partition(marks[2])
    if not (found_instruction and found_history and found_answer) or middle != before_history:
        raise UserError(
            "prompt.template=chat: the chat template changes the user's message, so its pieces cannot be "
            "found",
            "use prompt.template=alpaca",
        )
    ending = ending.lstrip()
    special = [token for token in tokenizer.all_special_tokens if token and ending.startswith(token)]
    bos = tokenizer.bos_token is not None and head.startswith(tokenizer.bos_token) and adds_bos(tokenizer)
    if bos:
        head = head.removeprefix(tokenizer.bos_token)
    return PromptTemplate(
        "chat",
        domain,
        head,
        words["instruction"],
        before_history,
        tail,
        bos=bos,
        terminator=special[0] if special else None,
    )


def template_texts(prompt: PromptSection, domain: str) -> list[str]:
    """Returns the literal texts of a template, which a word-level tokenizer must know before it is made."""
    domain = prompt.domain or domain
    if prompt.template.endswith(".json"):
        defaults = {"style": "file", "domain": domain}
        template = PromptTemplate.load(preset_path(prompt.template), defaults)
        return [
            template.before_instruction,
            template.instruction,
            template.before_history,
            template.after_history,
            template.separator,
        ]
    style = prompt.template if prompt.template in WORDED else "alpaca"
    return [text for text in _wording(style, domain).values() if "{title}" not in text]
