"""YAML from anybody: plain data, of bounded size, or one kind of error."""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 200_000
MAX_DEPTH = 50  # PyYAML takes time with the square of it
MAX_VALUES = 100_000  # with every alias written out: a few lines of aliases can stand for billions


def load_yaml(text: str) -> Any:
    """The plain data of a YAML document.

    Raises yaml.YAMLError for text that is no YAML, also where PyYAML raises something else (a date that does not
    exist, a number with too many digits, brackets too deep), holds itself, or is larger than the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        data = yaml.safe_load(text)
        num_values = _num_values(data, {})
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None
    if num_values > MAX_VALUES:
        raise yaml.YAMLError(f"{num_values} values with aliases written out, at most {MAX_VALUES} are read")
    return data


def _num_values(node: Any, known: dict[int, int | None]) -> int:
    """How many values a node stands for; each object is looked at once. None marks one that is being counted."""
    if not isinstance(node, dict | list | tuple | set):
        return 1
    if id(node) in known:
        num = known[id(node)]
        if num is None:
            raise ValueError("a value that holds itself")
        return num
    known[id(node)] = None
    children = [*node, *node.values()] if isinstance(node, dict) else list(node)
    total = 1 + sum(_num_values(child, known) for child in children)
    known[id(node)] = total
    return total
