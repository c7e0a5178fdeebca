"""The batch scripts as texts.

They parse, they are clean, and what they read from the environment is documented.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gdrt_ds.errors import EXIT_INTERRUPTED

HOME = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((HOME / "slurm").glob("*.sh"))


def test_the_training_script_knows_an_interruption_by_the_status_that_training_ends_with():
    text = (HOME / "slurm" / "gdrt.sh").read_text(encoding="utf-8")
    written = re.findall(r"(?:conclude |STEP_CODE=)(\d+)", text)
    assert len(written) == 2
    assert set(map(int, written)) == {EXIT_INTERRUPTED}


def test_the_scripts_pass_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS), str(HOME / "tests" / "slurm" / "cluster" / "machine.sh")],
        capture_output=True,
        text=True,
        cwd=HOME,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_a_batch_script_is_strict_and_requeues(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text(encoding="utf-8")
    if "#SBATCH" in text:
        assert (
            "set -euo pipefail" in text
            and "#SBATCH --requeue" in text
            and "#SBATCH --open-mode=append" in text
        )
        assert "#SBATCH --gpus" not in text, (
            "a GPU request in the script clashes with one on the command line"
        )


def test_every_setting_of_the_scripts_is_documented():
    internal = {
        "GDRT_CONTAINER_WORDS",
        "GDRT_RANK_LOGS",
        "GDRT_SIGNALS",
        "GDRT_LIFE",
    }  # between the scripts, not for users
    read = set().union(
        *(
            re.findall(r"GDRT_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))
            for path in [*SCRIPTS, *(HOME / "slurm").glob("*.py")]
        )
    )
    table = (HOME / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert sorted(name for name in read - internal if f"`{name}`" not in table) == []


def test_messages_that_the_guide_lists_exist_in_the_code():
    guide = (HOME / "docs" / "clusters.md").read_text(encoding="utf-8")
    failures = guide.partition("## Common failures")[2].partition("## What only")[0]
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("slurm", "gdrt_ds")
        for path in (HOME / folder).rglob("*")
        if path.suffix in (".sh", ".py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message that goes on in the next line is one message
    ours = [
        "the project was not found from",
        "no Python environment",
        "cannot run gdrt_ds on",
        "is not writable on",
        "unequal GPUs per node",
        "is smaller than the",
        "fewer CPUs than ranks on a node",
        "was taken over by",
        "no progress: ",
        "belongs to a chain that still lives",
        "the job is held: free space",
    ]
    for words in ours:
        assert words in failures and words in code, words
