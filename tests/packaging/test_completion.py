"""The shell completes options and settings of our commands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("argcomplete")


def completions(command: str, function: str, line: str, folder) -> list[str]:
    """What the shell is offered at the end of a line."""
    answer = folder / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    module = f"import sys; sys.argv[0] = {command!r}; from {function.rpartition('.')[0]} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", module], env=os.environ | asked, capture_output=True, text=True, timeout=300
    )
    assert answer.is_file(), done.stderr
    return [word.strip() for word in answer.read_text().split("\n") if word.strip()]


def test_options_and_settings_of_a_training_are_completed(tmp_path):
    found = completions("gdrt-train", "gdrt_ds.commands.train.main", "gdrt-train dro.t", tmp_path)
    assert found == ["dro.tau="]
    found = completions("gdrt-train", "gdrt_ds.commands.train.main", "gdrt-train --pl", tmp_path)
    assert found == ["--plan"]


def test_options_of_an_evaluation_are_completed(tmp_path):
    found = completions("gdrt-eval", "eval.run.main", "gdrt-eval --audit-u", tmp_path)
    assert found == ["--audit-users"]
