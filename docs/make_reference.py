"""Writes docs/config-reference.md from the settings' own descriptions in gdrt_ds/config/.

python docs/make_reference.py            # writes the page
python docs/make_reference.py --check    # exits with status 1 where the page is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gdrt_ds.config import RunConfig
from gdrt_ds.config.explaining import allowed_values, is_section, written
from gdrt_ds.files import write_text

PAGE = Path(__file__).with_name("config-reference.md")

HEAD = """# Every setting

This page is written by `python docs/make_reference.py` from the sections in gdrt_ds/config/. A test fails if
it is stale.

A run config is a YAML file of sections. Any key can also be given on the command line as `section.key=value`,
e.g. `dro.tau=0.3` or `model.lora.r=16`; the command line wins. Every key has a default. An unknown key is an
error that names the nearest known one. "empty" is written `null` in YAML and `key=` on the command line.
Words that are special to this project are explained in the [glossary](glossary.md).
"""


def default_of(field: FieldInfo) -> str:
    """The default as it is written in YAML."""
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory()
    if value is None:
        return "empty"
    return f"`{written(value)}`"


def tables(model: type[BaseModel], prefix: str, title: str) -> list[str]:
    """One table per section, nested sections behind it.

    Raises:
        ValueError: a key has no description.
    """
    rows = []
    behind = []
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(f"{prefix}{name} has no description in gdrt_ds/config/")
        if is_section(field):
            behind += tables(field.annotation, f"{prefix}{name}.", f"`{prefix}{name}`")
            continue
        cells = (f"`{prefix}{name}`", default_of(field), allowed_values(field), field.description)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    purpose = model.__doc__.strip().splitlines()[0]
    lines = [
        f"## {title}",
        purpose,
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    return lines + behind


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *tables(RunConfig, "", "Keys without a section")])


def main(argv: list[str]) -> int:
    if "--check" in argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page():
            print(f"{PAGE.name} is stale; run: python docs/make_reference.py", file=sys.stderr)
            return 1
        return 0
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
