"""Audits over finished evaluations, without loading a model: `python -m eval.audit cross_tuning|debiasing DIR DIR ... [--output DIR]`.

Writes NAME.json, NAME.md and NAME.html into --output and prints the finding. Audits of one model run inside eval.run (--audit).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OVER_RUNS = ("cross_tuning", "debiasing")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("audit", choices=OVER_RUNS)
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="evaluation folders, or run folders that were evaluated"
    )
    parser.add_argument("--output", default=".", help="where the page goes (default: here)")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of the intervals")
    options = parser.parse_args(arguments)
    from gdrt_ds.runtime import report_user_errors

    with report_user_errors():
        from eval.audit import AuditOptions, cross_tuning, debiasing, finite
        from eval.report.content import Page, audit_section
        from eval.report.html import render_html
        from eval.report.markdown import render_markdown

        module = {"cross_tuning": cross_tuning, "debiasing": debiasing}[options.audit]
        found = finite(
            module.compare_runs(
                options.folders, AuditOptions(runs=tuple(options.folders), num_bootstrap=options.bootstrap)
            )
        )
        page = Page(
            "Audit over runs",
            f"{len(options.folders)} folders",
            "",
            [],
            [audit_section(options.audit, found)],
        )
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{options.audit}.json").write_text(
            json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8"
        )
        (output / f"{options.audit}.md").write_text(render_markdown(page), encoding="utf-8")
        (output / f"{options.audit}.html").write_text(render_html(page), encoding="utf-8")
        print(found["finding"])
        print(f"written: {output}/{options.audit}.html, {options.audit}.md, {options.audit}.json")


if __name__ == "__main__":
    main()
