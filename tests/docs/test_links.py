"""The pages of the documentation lead to files and headings that exist, and each has its place in the site.

This needs no mkdocs, so it runs with the quick tests. tests/docs/test_site.py builds the site itself.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import gdrt_ds
from gdrt_ds.files import REPOSITORY

DOCS = REPOSITORY / "docs"
OUTSIDE = [
    REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ds_configs/README.md")
]
PAGES = OUTSIDE + sorted(DOCS.rglob("*.md"))

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#* *$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site both write them.

    A heading that occurs twice is left out: GitHub and the site number the second one differently.
    """
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain]
    return {slug for slug in slugs if slugs.count(slug) == 1}


def relative_links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, outside code, that are not addresses of other hosts."""
    prose = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [
        target for target in LINK.findall(prose) if "://" not in target and not target.startswith("mailto:")
    ]


def dead_links(page: Path) -> list[str]:
    """Those relative links of a page that lead to no file, or to no heading of it."""
    dead = []
    for target in relative_links(page):
        name, _, anchor = target.partition("#")
        file = page
        if name:
            file = page.parent / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose `!!python` tags name functions of mkdocs' extensions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of_the_navigation(entries: list) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                found.append(value)
            else:
                found += pages_of_the_navigation(value)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_relative_link_and_anchor_leads_somewhere(page):
    assert not dead_links(page)


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One\n```\n# A comment, no heading\n```\n## Twice\n## Twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one) [c](none.md) [d](other.md#a-comment-no-heading) [e](#here)\n"
        "`[f](code.md)` [g](https://example.org/x) [h](other.md#twice)\n\n## Here\n"
    )
    assert dead_links(page) == ["none.md", "other.md#a-comment-no-heading", "other.md#twice"]


def test_every_page_of_docs_has_one_place_in_the_navigation():
    settings = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)
    listed = pages_of_the_navigation(settings["nav"])
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    added = {"overview.md", "contributing.md", "changelog.md", "deepspeed-presets.md"}
    assert set(listed) == there | added


def test_the_api_page_describes_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    public = {f"{home}.{name}" for name, home in gdrt_ds._HOMES.items()}
    assert set(described) == public
