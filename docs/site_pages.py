"""A hook of mkdocs.yml: pages of the site that do not lie in docs/, and the links that lead to them.

On GitHub a page of docs/ links to ../README.md or to ../gdrt_ds/data/corpus.py. A site has no such files. So
the pages of ADDED become pages of the site, and every other file of the repository that a page links to
becomes a page that shows its text. Links are rewritten accordingly; the sources stay as they are. A link to a
file that does not exist is left alone, and the strict build refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"

ADDED = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ds_configs/README.md": "deepspeed-presets.md",
}
"""Path in the repository -> path in the site, of the pages that lie outside docs/."""

REPORTS = {
    f"docs/studies/{path.name}": f"studies/figures/{path.name}"
    for path in (ROOT / "docs/studies").glob("*.html")
}
"""The pages with figures that studies wrote: beside the Markdown page of the same name they need a folder."""

ADDED |= REPORTS
ORIGIN = {page: path for path, page in ADDED.items()}

LINK = re.compile(r"(?P<open>\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?P<close>\))")
FENCE = re.compile(r"(^ *```.*?^ *```|^ *~~~.*?^ *~~~)", re.MULTILINE | re.DOTALL)


def place_in_repository(page: str) -> str:
    """Where the source of a page of the site lies, relative to the top of the repository."""
    return ORIGIN.get(page, DOCS + page)


def place_in_site(path: str, files: Files) -> str | None:
    """The page or file of the site that shows a file of the repository; None if the site has none."""
    if path in ADDED:
        return ADDED[path]
    candidates = [source_page(path)]
    if path.startswith(DOCS):
        candidates.insert(0, path.removeprefix(DOCS))
    for candidate in candidates:
        found = files.get_file_from_path(candidate)
        if found is not None and not found.inclusion.is_excluded():
            return candidate
    return None


def source_page(path: str) -> str:
    """The page that shows a source file: source/gdrt_ds/train.py.md."""
    return f"source/{path}.md"


def linked_paths(markdown: str, page: str) -> set[str]:
    """Paths in the repository to which the relative links of a page lead."""
    folder = posixpath.dirname(place_in_repository(page))
    prose = FENCE.sub("", markdown)
    targets = {match["target"] for match in LINK.finditer(prose) if "://" not in match["target"]}
    return {posixpath.normpath(posixpath.join(folder, target)) for target in targets}


def show_source(path: str, config: MkDocsConfig) -> File:
    """A page with the text of a file. The search leaves it out: it would drown the documentation."""
    language = Path(path).suffix.lstrip(".") or "text"
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    content = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n~~~~~{language}\n{text}\n~~~~~\n"
    return File.generated(config, source_page(path), content=content)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of ADDED and of every source file that a page links to."""
    for path, page in ADDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    pages = [file for file in files.documentation_pages() if not file.inclusion.is_excluded()]
    linked = {path for file in pages for path in linked_paths(file.content_string, file.src_uri)}
    for path in sorted(linked):
        if (ROOT / path).is_file() and place_in_site(path, files) is None:
            files.append(show_source(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the relative links of a page, outside code, to what the site has in their place."""
    folder = posixpath.dirname(place_in_repository(page.file.src_uri))
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match) -> str:
        if "://" in match["target"]:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        there = place_in_site(path, files)
        if there is None:
            return match[0]
        return f"]({posixpath.relpath(there, here or '.')}{match['anchor'] or ''})"

    pieces = FENCE.split(markdown)
    return "".join(piece if FENCE.fullmatch(piece) else LINK.sub(rewritten, piece) for piece in pieces)
