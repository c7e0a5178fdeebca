"""The prompt of a run that is resumed, where its chat template writes the date.

Templates of widely used models begin with "Today Date: ...". Rendered anew on another day they give other
tokens, and a run could not go on. So a resumed run takes the words with which it began, from its prompt.json.
The date stands before the user's message: a template that differs elsewhere is another one, and stays.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdrt_ds.config import RunConfig
from gdrt_ds.data.row_prompts import STYLE, RowEncoder, saved_pieces
from gdrt_ds.data.templates import PromptTemplate

CLOCK = "strftime_now"  # the function by which transformers' templates ask for the date
NOTE = "prompt: the chat template writes the date; the words with which this run began are kept"


def template_of(config: RunConfig, domain: str, tokenizer: Any) -> tuple[PromptTemplate, list[str]]:
    """The template of a run, and a line where it is that of the run's beginning.

    Raises:
        UserError: see `PromptTemplate.from_config`.
    """
    template = PromptTemplate.from_config(config.prompt, domain, tokenizer)
    saved = _saved(config, tokenizer)
    if template.style != "chat" or saved is None:
        return template, []
    now = asdict(template)
    if {**saved, "before_instruction": now["before_instruction"]} != now or saved == now:
        return template, []
    return PromptTemplate(**saved), [NOTE]


def row_encoder_of(config: RunConfig, tokenizer: Any) -> tuple[RowEncoder, list[str]]:
    """The encoder of a run on rows, and a line where its conversations begin as at the run's beginning."""
    saved = _saved(config, tokenizer)
    encoder = RowEncoder(config.prompt, tokenizer)
    if saved is None or saved.get("style") != STYLE or not saved.get("pieces"):
        return encoder, []
    if saved.get("chat") != encoder.chat:
        return encoder, []
    kept = saved_pieces(saved)
    now = {roles: encoder.pieces_of(roles) for roles in kept}
    if any(now[roles][1:] != pieces[1:] for roles, pieces in kept.items()) or now == kept:
        return RowEncoder(config.prompt, tokenizer), []
    return RowEncoder(config.prompt, tokenizer, kept), [NOTE]


def _saved(config: RunConfig, tokenizer: Any) -> dict[str, Any] | None:
    """prompt.json of the run that `resume` names; None where nothing is resumed or no date is written."""
    if config.resume is None or CLOCK not in str(getattr(tokenizer, "chat_template", None)):
        return None
    run = Path(config.run.dir)
    if config.resume != "auto" and Path(config.resume).is_dir():
        run = Path(config.resume).absolute().parent.parent  # RUN/checkpoints/step_N, maybe of another run
    try:
        return json.loads((run / "prompt.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nothing to go on from, which the resuming says itself
        return None
