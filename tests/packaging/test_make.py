"""What `make install` does, read from its commands, and what `make test` begins with."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from gdrt_ds.files import REPOSITORY
from tests.conftest import LONGEST


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("given, translated", [({}, False), ({"PYTHONDONTWRITEBYTECODE": "1"}, True)])
def test_modules_are_translated_at_once_where_python_may_not_write_them_down(given, translated, tmp_path):
    """Else each process would translate thousands of them again."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "MAKEFLAGS", "MAKELEVEL")
    }
    command = ["make", "-n", "install", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("-m compileall" in done.stdout) is translated


def test_the_files_that_begin_first_are_there():
    """A file that was renamed would silently begin last."""
    assert [name for name in LONGEST if not (REPOSITORY / name).is_file()] == []
