"""The planted errors of `make test-mutations` still find their places, and a cheap one is planted here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.mutation_table import MUTATIONS
from tests.mutations import ROOT, lost_places


def test_every_mutation_finds_its_place_in_the_source():
    assert not lost_places()
    named = {m.what.split()[0] for m in MUTATIONS if m.what[0].isdigit()}
    assert named == {str(n) for n in range(1, 12)}  # the eleven errors of docs/method.md


@pytest.mark.slow
def test_a_planted_error_is_killed_and_the_command_says_so():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/mutations.py"), "--only", "CVaR takes the best share"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "1 planted, 1 killed, 0 not" in done.stdout, (
        done.stdout + done.stderr[-2000:]
    )
