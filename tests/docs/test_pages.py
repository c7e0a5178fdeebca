"""README and docs point to files that exist, and show the commands that users rely on."""

from __future__ import annotations

import re

import pytest

from gdrt_ds.files import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md")) + sorted((REPOSITORY / "docs/tutorials").glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(
    r"`((?:gdrt_ds|eval|docs|configs|ds_configs|slurm|tests|benchmarks)/[\w./-]+\.\w+)(?:::?[^`]*)?`"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    links = [page.parent / target for target in LINK.findall(text) if "://" not in target]
    named = [REPOSITORY / target for target in PATH.findall(text)]
    missing = sorted({str(path.relative_to(REPOSITORY)) for path in links + named if not path.exists()})
    assert not missing, f"{page.name} names files that do not exist: {missing}"


def test_the_readme_shows_the_commands_that_users_rely_on():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for command in (
        "make quickstart",
        "make test",
        "make test-fast",
        "deepspeed gdrt_ds/train.py",
        "sbatch slurm/gdrt.sh",
        "python -m eval.run",
    ):
        assert command in text, command


def test_every_page_that_the_code_names_exists_and_the_readme_lists_the_formats():
    sources = [
        path for package in ("gdrt_ds", "eval", "slurm") for path in (REPOSITORY / package).rglob("*.py")
    ]
    named = {page for path in sources for page in re.findall(r"docs/[\w-]+\.md", path.read_text("utf-8"))}
    assert len(named) > 5
    assert not {page for page in named if not (REPOSITORY / page).is_file()}
    formats = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Your own data")[1].split("\n## ")[0]
    )
    for name in ("train.csv", "id2name4Rec.json", "item table", "MovieLens", "Amazon reviews", "planted"):
        assert name in formats, name


def test_the_tour_names_ten_files_of_the_code():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    tour = text.split("## A tour of the code")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. \[", tour, re.MULTILINE)) == 10


def test_the_readme_gives_the_sizes_of_the_table_that_the_memory_plan_wrote():
    clusters = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    sizes = {}
    for line in clusters.split("<!-- sizes: ")[1].split("<!-- sizes end")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "GiB" in line:
            model, _, one, _, _, eight, *_ = cells
            sizes[model] = (one, eight)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+B \([\w-]+\)) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) == 3
    for model, one, eight in rows:
        assert (one, eight) == sizes[model], model


def test_the_readme_names_every_family_of_the_support_matrix():
    matrix = (REPOSITORY / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    table = matrix.split("| family | samples share rows |")[1].split("\n\n")[0]
    families = {row.split("|")[1].strip().split(",")[0] for row in table.splitlines()[2:]}
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    support = readme.split("## Hardware and support")[1].split("\n## ")[0]
    packed = next(row for row in support.splitlines() if "tested with packing" in row)
    assert len(families) > 12
    for family in families:
        assert re.search(rf"\b{re.escape(family)}\b(?!-)", support), family
    for row in table.splitlines()[2:]:
        name, shares, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        named = re.search(rf"\b{re.escape(name.split(',')[0])}(?=[, ])", packed) is not None
        assert named == (shares == "yes"), row
