"""Audits over finished evaluations, without a model: `python -m eval.audit NAME DIR DIR ... [--output DIR]`.

Writes NAME.json, NAME.md and NAME.html into --output and prints the finding. Audits of one model run inside
`python -m eval.run --audit`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.audit.options import AuditOptions
from eval.audit.running import OVER_RUNS
from gdrt_ds.files import finite, write_json, write_text
from gdrt_ds.registry import find_part, part_names
from gdrt_ds.runtime import report_user_errors


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("audit", choices=part_names(OVER_RUNS))
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="evaluation folders, or run folders that were evaluated"
    )
    parser.add_argument("--output", default=".", help="where the page goes (default: here)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the intervals")
    return parser.parse_args(arguments)


def write_page(name: str, options: argparse.Namespace) -> str:
    """Runs the audit and writes its three files; returns its finding."""
    from eval.report.content import Page, audit_section
    from eval.report.html import render_html
    from eval.report.markdown import render_markdown

    audit = find_part(OVER_RUNS, "AUDIT", name, "audit")
    settings = AuditOptions(runs=tuple(options.folders), num_bootstrap=options.bootstrap)
    found = finite(audit.headed(audit.compare(options.folders, settings)))
    # A limited evaluation marks the page like every other page that shows it.
    warning = " ".join(note for note in found.get("notes", []) if note.startswith("Not a result"))
    folders = f"{len(options.folders)} folders"
    page = Page("Audit over runs", folders, warning, [], [audit_section(name, found)])
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"{name}.json", found)
    write_text(output / f"{name}.md", render_markdown(page))
    write_text(output / f"{name}.html", render_html(page))
    return found["finding"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    name = options.audit
    with report_user_errors():
        print(write_page(name, options))
        print(f"written: {options.output}/{name}.html, {name}.md, {name}.json")


if __name__ == "__main__":
    main()
