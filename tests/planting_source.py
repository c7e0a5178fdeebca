"""Plants a change in one function of a source text: found by its words, whatever the formatter did to its
lines.

A change is (function, old, new). `old` is compared word by word inside the function's source: white space,
line breaks, comments and trailing commas do not count. It must occur exactly once there.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

STRING = r'"""(?:[^\\]|\\.)*?"""|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\''
WORD = re.compile(rf"(?P<comment>#[^\n]*)|(?:[rbfRBF]{{0,2}}(?:{STRING}))|\w+|[^\w\s]", re.S)


class LostPlace(Exception):
    """The function is gone, or the text does not occur in it exactly once."""


@dataclass(frozen=True)
class Word:
    text: str
    start: int
    stop: int


def words(source: str) -> list[Word]:
    """The lexical words of a piece of Python, without comments and trailing commas."""
    found = [
        Word(match.group(), match.start(), match.end())
        for match in WORD.finditer(source)
        if match.group("comment") is None
    ]
    following = [word.text for word in found[1:]] + [""]
    return [
        word for word, after in zip(found, following) if not (word.text == "," and after in (")", "]", "}"))
    ]


def span_of(source: str, function: str) -> tuple[int, int]:
    """Character positions of a function or class by its qualified name; `<module>` is the whole text."""
    if function == "<module>":
        return 0, len(source)
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        inside = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name]
        if not inside:
            raise LostPlace(f"there is no {function}")
        node = inside[0]
    return offsets[node.lineno - 1], offsets[node.end_lineno]


def plant(source: str, function: str, old: str, new: str) -> str:
    """The source with `old` replaced by `new` inside `function`.

    Raises:
        LostPlace: no such function, or `old` does not occur in it exactly once.
    """
    start, stop = span_of(source, function)
    here = words(source[start:stop])
    wanted = [word.text for word in words(old)]
    texts = [word.text for word in here]
    places = [k for k in range(len(texts)) if texts[k : k + len(wanted)] == wanted]
    if len(places) != 1:
        raise LostPlace(f"{function} has {len(places)} places that read {old!r}")
    first, last = here[places[0]], here[places[0] + len(wanted) - 1]
    return source[: start + first.start] + new.strip() + source[start + last.stop :]
