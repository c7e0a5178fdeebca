"""A command in a fork ends as it would in a process of its own."""

from __future__ import annotations

import sys

import pytest

from tests.forked import run_forked


def command(words: list[str]) -> int | None:
    print("said", *words)
    if words == ["text"]:
        raise SystemExit("it is wrong")
    if words == ["code"]:
        sys.exit(4)
    if words == ["bug"]:
        raise ValueError("a bug")
    return 3 if words == ["status"] else None


@pytest.mark.parametrize(
    "word, status, told",
    [("none", 0, ""), ("status", 3, ""), ("code", 4, ""), ("text", 1, "it is wrong"), ("bug", 1, "a bug")],
)
def test_its_status_and_what_it_says_are_kept(tmp_path, capfd, word, status, told):
    done = run_forked(command, [word], tmp_path)
    assert (done.returncode, done.stdout) == (status, f"said {word}\n")
    assert told in done.stderr and bool(told) == bool(done.stderr)
    assert "said" not in capfd.readouterr().out
