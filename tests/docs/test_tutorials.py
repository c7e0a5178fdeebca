"""The commands of each tutorial work: they are read from the page and run in order, in an empty folder.

They train for minutes, so `make docs` runs them, and `make test` only checks that no block is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdrt_ds.files import REPOSITORY

TUTORIALS = REPOSITORY / "docs" / "tutorials"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "console"}  # run here; needs a cluster

PAGES = [
    pytest.param(page, id=page.stem, marks=pytest.mark.tutorials) for page in sorted(TUTORIALS.glob("*.md"))
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def write_commands(folder: Path) -> None:
    """Our console commands, as an installation writes them, for the code of this checkout."""
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    scripts = project.split("[project.scripts]")[1].split("\n[")[0]
    folder.mkdir(parents=True)
    for name, module, function in re.findall(r'^(\S+) = "([\w.]+):(\w+)"$', scripts, re.MULTILINE):
        path = folder / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            f"from {module} import {function}\nsys.exit({function}())\n"
        )
        path.chmod(0o755)


def run_page(page: Path, folder: Path) -> Path:
    """Runs the page's blocks in one shell, as a reader does; returns the reader's folder."""
    write_commands(folder / "bin")
    work = folder / "work"
    work.mkdir()
    script = ["set -euo pipefail"]
    for number, text in enumerate(blocks(page, "bash"), 1):
        script += [f"echo '== block {number} of {page.name}'", text]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = inherited | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return work


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_tutorial_works_in_its_order(page, tmp_path):
    work = run_page(page, tmp_path)
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^\| `(runs/[^`]+)` \|", text, re.MULTILINE):
        assert (work / name).is_file(), f"{page.name} names {name}, which its commands do not write"
    for script in work.glob("slurm/*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    for block in blocks(page, "console"):
        for command in block.replace("\\\n", "").splitlines():
            assert command.startswith(("$ sbatch ", "$ python slurm/submit.py ")), command
            for file in re.findall(r"\S+\.(?:sh|py|yaml)\b", command):
                assert (work / file).is_file(), command


def test_a_tutorial_has_no_block_that_nobody_runs():
    assert len(PAGES) >= 3
    for page in TUTORIALS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        languages = {language for language, _ in FENCE.findall(text)}
        assert languages <= LANGUAGES and "bash" in languages, page.name
        assert text.count("```") == 2 * len(FENCE.findall(text)), f"{page.name}: a fence does not match"


def test_a_command_that_fails_fails_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntrue\n```\ntext\n```bash\ngdrt-init nowhere.csv\necho later\n```\n")
    with pytest.raises(AssertionError, match="(?s)block 2 of page.md.*nowhere.csv") as failure:
        run_page(page, tmp_path / "reader")
    assert "later" not in str(failure.value)
