"""The built site is complete, searchable from a disk, and asks no other host for anything.

`make docs` runs this. Elsewhere it is skipped where mkdocs is not installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gdrt_ds.files import REPOSITORY

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs")
pytest.importorskip("material", reason="mkdocs-material is not installed: make docs")

pytestmark = pytest.mark.slow

# What a browser fetches by itself: scripts, pictures, frames, style sheets, fonts. Links are not fetched.
FETCHED = [
    re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\bsrc=[\"']?(?:https?:)?//[^\s\"'>]+"
    ),
    re.compile(
        r"<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon|dns-prefetch))"
        r"[^>]*href=[\"']?(?:https?:)?//[^>]+"
    ),
    re.compile(r"url\([\"']?(?:https?:)?//[^)]+\)|@import\s+[\"'](?:https?:)?//[^\"']+"),
]


def build(folder: Path, source: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_of_other_folders_and_linked_sources_are_part_of_the_site(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="overview.html"' in home and 'href="deepspeed-presets.html"' in home
    overview = (site / "overview.html").read_text(encoding="utf-8")
    assert "A tour of the code" in overview
    assert 'src="figures/method.png"' in overview
    assert 'href="source/gdrt_ds/data/corpus.py.html"' in overview
    assert "def load_corpus" in re.sub(
        r"<[^>]+>", "", (site / "source/gdrt_ds/data/corpus.py.html").read_text()
    )


def test_the_api_page_shows_signatures_and_docstrings(site):
    page = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert ":::" not in page.split("README")[-1]
    for words in ("group_cross_entropy", "Cross-entropy of the head", "chunk_bytes", "ema_rate"):
        assert words in page, words


def test_a_browser_fetches_nothing_from_another_host(site):
    checked = 0
    for file in site.rglob("*"):
        if file.suffix in (".html", ".css"):
            text = file.read_text(encoding="utf-8")
            found = [match[0] for pattern in FETCHED for match in pattern.finditer(text)]
            assert not found, f"{file.relative_to(site)}: {found}"
            checked += 1
    assert checked > 30
    scripts = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.js"))
    assert "fonts.googleapis" not in scripts


def test_the_search_answers_in_a_browser_that_reads_the_site_from_the_disk(site, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page in (Debian: apt-get install chromium)")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=20000", "--dump-dom", f"file://{site}/index.html?q=renormalised",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    results = re.findall(r'<a href="([^"]+)" class="md-search-result__link"', shown)
    assert any("evaluation.html" in link for link in results), shown[-2000:]


@pytest.mark.parametrize(
    "text, complaint",
    [("[x](nowhere.md)", "nowhere.md"), ("[x](method.md#no-such-heading)", "no-such-heading")],
    ids=["dead-link", "dead-anchor"],
)
def test_a_dead_link_or_anchor_ends_the_build(tmp_path, text, complaint):
    for path in REPOSITORY.iterdir():
        if path.name not in ("docs", "build", ".git"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    assert build(tmp_path / "built", tmp_path).returncode == 0
    page = tmp_path / "docs" / "glossary.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n{text}\n", encoding="utf-8")
    done = build(tmp_path / "built", tmp_path)
    assert done.returncode != 0 and complaint in done.stderr
