"""YAML of plain values, in which no key is given twice."""

from __future__ import annotations

from typing import IO, Any

import yaml

__all__ = ["PlainLoader", "load_yaml"]

_MERGE = "tag:yaml.org,2002:merge"


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that a mapping has twice: PyYAML keeps the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Constructs a mapping; see PyYAML.

        Raises:
            yaml.MarkedYAMLError: If it has a key twice.
        """
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in first:
                where = f"in line {line}" if first[name] == line else f"in lines {first[name]} and {line}"
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice, {where}: keep one, with all below it")
            first[name] = line
        return super().construct_mapping(node, deep)


def load_yaml(stream: str | IO[str]) -> Any:
    """Returns the content of a text in YAML.

    Raises:
        yaml.YAMLError: If it is no YAML, has object tags, or has a key twice.
    """
    return yaml.load(stream, PlainLoader)  # a safe loader
