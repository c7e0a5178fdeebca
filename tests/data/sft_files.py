"""Rows of prompt and completion for tests, with a planted shortcut.

A report names a place and may quote a note. Where the answer follows the note (the evidence), the place is
mostly right about it too (the shortcut): in the rows of kind `conflict` it is not. The completion has an
answer and a reason, which are spans of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gdrt_ds.data.text_rows import Columns, TextRows, row_of

ANSWERS = (" yes, because of the note", " no, because of the note")


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with spans, auxiliary prompts, choices and the column `kind`."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        truth = bool(generator.random() < 0.5)
        cue = truth if generator.random() < 0.8 else not truth
        place = "north" if cue else "south"
        answer = ANSWERS[0] if truth else ANSWERS[1]
        comma = answer.index(",")
        found.append(
            {
                "prompt": f"Report {number} from {place}. The note {'agrees' if truth else 'denies'}. So?",
                "completion": answer,
                "auxiliary_prompt": f"Report from {place}. So?",
                "group": [
                    {"start": 0, "end": comma, "label": "answer"},
                    {"start": comma, "end": len(answer), "label": "reason"},
                ],
                "choices": list(ANSWERS),
                "kind": "shortcut" if cue == truth else "conflict",
            }
        )
    return found


def text_rows(count: int, seed: int = 0) -> TextRows:
    """The same as a reader returns them, all in train."""
    found = [row_of(values, Columns({}), place) for place, values in enumerate(rows(count, seed))]
    return TextRows({"train": found, "valid": [], "test": []})


def write_lines(path: Path, values: list[Any]) -> Path:
    """Writes JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def write_splits(folder: Path, sizes: tuple[int, int, int] = (96, 16, 40)) -> Path:
    """Writes train.jsonl, valid.jsonl and test.jsonl; returns the folder."""
    for seed, (split, size) in enumerate(zip(("train", "valid", "test"), sizes, strict=True)):
        write_lines(folder / f"{split}.jsonl", rows(size, seed))
    return folder
