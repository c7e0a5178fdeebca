"""Reads YAML files that people write: run configs and study files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gdrt_ds.errors import UserError


class PlainLoader(yaml.SafeLoader):
    """A safe loader that knows no dates: no setting is one, and a revision or a folder can look like one."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _OnceEach(PlainLoader):
    """It refuses a key that stands twice: YAML lets the last one win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and name in lines:
                raise UserError(
                    f"`{name}` stands twice, in lines {lines[name]} and {line}; the second would replace the "
                    "first",
                    "write it once",
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(file: Path, what: str) -> Any:
    """The content of a YAML file that people write.

    Args:
        what: names the file in messages.

    Raises:
        UserError: not UTF-8, not YAML, or a key that stands twice.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_OnceEach)
    except UserError as error:
        raise UserError(f"{what}: {error.problem}", error.fix) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: it is not UTF-8 ({error})", "save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{what}: not valid YAML: {error}", "check the indentation at that line") from None
