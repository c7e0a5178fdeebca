"""Writes tickets as rows of prompt and completion: train.jsonl, valid.jsonl and test.jsonl.

    python docs/examples/rows/tickets.py FOLDER

A ticket names a channel and quotes a complaint. The complaint (the evidence) decides which team it goes to.
The channel (the shortcut) is right in four of five tickets; in those of kind `conflict` it is wrong.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

COMPLAINTS = {"billing": ["I paid twice", "my invoice is wrong"], "network": ["no signal", "it is slow"]}
CHANNELS = {"billing": "mail", "network": "phone"}
SIZES = {"train": 400, "valid": 40, "test": 200}
ANSWERS = [f" {team}, by the complaint" for team in COMPLAINTS]


def ticket(draw: random.Random) -> dict:
    """One row: the answer and its reason are spans of the completion."""
    team = draw.choice(list(COMPLAINTS))
    other = next(name for name in COMPLAINTS if name != team)
    follows = draw.random() < 0.8
    channel = CHANNELS[team if follows else other]
    answer = f" {team}, by the complaint"
    comma = answer.index(",")
    return {
        "prompt": f"Ticket by {channel}: {draw.choice(COMPLAINTS[team])}. Which team?",
        "completion": answer,
        "auxiliary_prompt": f"Ticket by {channel}. Which team?",
        "group": [
            {"start": 0, "end": comma, "label": "team"},
            {"start": comma, "end": len(answer), "label": "reason"},
        ],
        "choices": ANSWERS,
        "kind": "shortcut" if follows else "conflict",
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate(SIZES.items()):
        draw = random.Random(seed)
        lines = [json.dumps(ticket(draw)) + "\n" for _ in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
