"""The container recipes: what they name exists, they agree with each other and with docs/install.md.

No image is built here; docs/install.md says so.
"""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from clean_site import FILES, SOURCES

from gdrt_ds.files import REPOSITORY

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

FOLDER = REPOSITORY / "containers"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (FOLDER / "gdrt_ds.def").read_text(encoding="utf-8")
INSTALL = (FOLDER / "install.sh").read_text(encoding="utf-8")
PAGE = (REPOSITORY / "docs" / "install.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """The lines of one section of the Apptainer definition."""
    return DEFINITION.split(f"\n%{name}\n")[1].split("\n%")[0]


def docker(instruction: str) -> list[str]:
    """The arguments of every such instruction, continued lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{instruction} (.+)$", joined, re.MULTILINE)


def copied_by_docker() -> dict[str, str]:
    """Source in the checkout -> path in the image."""
    found = {}
    for words in map(str.split, docker("COPY")):
        *sources, target = words
        for source in sources:
            found[source] = f"/opt/gdrt_ds/{source if target == './' else target}"
    return found


def copied_by_apptainer() -> dict[str, str]:
    return dict(line.split() for line in section("files").splitlines() if line.strip())


def test_both_recipes_copy_what_the_wheel_is_built_from_and_nothing_else():
    copied = copied_by_docker()
    assert copied == copied_by_apptainer()
    assert set(copied) == {*SOURCES, *FILES, "constraints.txt", "containers/install.sh"}
    assert all((REPOSITORY / source).exists() for source in copied)
    assert all(target == f"/opt/gdrt_ds/{source}" for source, target in copied.items())


def test_nothing_that_is_copied_is_left_out_of_the_context():
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    tops = {source.split("/")[0] for source in copied_by_docker()}
    assert ignored and not tops & set(ignored)


def test_both_recipes_begin_with_the_same_image_and_the_same_packages():
    image = re.search(r"^From: (\S+)$", DEFINITION, re.MULTILINE).group(1)
    assert docker("FROM") == [image]
    python = re.fullmatch(r"python:(\d\.\d+)-slim-\w+", image).group(1)
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"Programming Language :: Python :: {python}"' in project
    wanted = re.findall(r"apt-get install .*", DOCKERFILE.replace(" \\\n", "\n"))
    assert [line.strip() for line in wanted] == re.findall(r"apt-get install .*", section("post"))


def test_both_recipes_run_the_one_script_with_the_index_of_torch():
    line = 'TORCH_INDEX="{}" sh containers/install.sh'
    assert line.format("$TORCH_INDEX") in docker("RUN")
    assert line.format("{{ TORCH_INDEX }}") in section("post")
    assert docker("ARG") == ["TORCH_INDEX="] and section("arguments").strip() == "TORCH_INDEX="


def test_the_script_installs_pinned_versions_and_extras_that_exist():
    commands = [shlex.split(line, comments=True) for line in INSTALL.splitlines() if "pip install" in line]
    torch, package = commands
    assert torch[-1] == "$(grep '^torch==' constraints.txt)"
    pinned = re.findall(r"^torch==.+$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert len(pinned) == 1
    assert package[-3:-1] == ["-c", "constraints.txt"]
    extras = re.fullmatch(r"\.\[(.+)\]", package[-1]).group(1).split(",")
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    optional = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert set(extras) <= set(re.findall(r"^([\w-]+) = \[", optional, re.MULTILINE))


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_every_piece_of_shell_can_be_parsed(shell):
    pieces = [INSTALL, section("post"), section("test"), section("runscript"), *docker("RUN")]
    for piece in pieces:
        done = subprocess.run([shell, "-n"], input=piece, capture_output=True, text=True)
        assert done.returncode == 0, (piece, done.stderr)


@pytest.mark.skipif(tomllib is None, reason="Python 3.10 reads no TOML")
def test_every_command_of_recipes_and_docs_is_installed_and_every_file_of_the_docs_is_there():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    part = PAGE.split("\n## In a container\n")[1].split("\n## ")[0]
    named = set(re.findall(r"\bgdrt-[a-z]+\b", DOCKERFILE + section("test") + INSTALL + part))
    assert named and named <= set(scripts)
    for path in re.findall(r"\b(?:containers|configs)/[\w.]+\w", DOCKERFILE + DEFINITION + INSTALL + part):
        assert (REPOSITORY / path).is_file(), path
    for build in ("docker build -f containers/Dockerfile -t gdrt_ds .", "apptainer build gdrt_ds.sif"):
        assert build in part
        assert build in DOCKERFILE + DEFINITION
