"""Every key that a recipe may have, from the schema itself: name, type, default, meaning."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dare.core.recipe import Plugin, Recipe
from dare.core.registry import TABLES, resolve


class Key(typing.NamedTuple):
    name: str  # dotted
    type: str
    default: str
    description: str


def schema_text() -> str:
    """The recipe's keys, then the options of every algorithm and task."""
    sections = ["# recipe", *_lines(recipe_keys())]
    for table, key in (("algorithms", "algorithm"), ("tasks", "task")):
        for name in TABLES[table]:
            sections += ["", f"# {key}: {{name: {name}}}", *_lines(plugin_keys(table, name))]
    return "\n".join(sections)


def recipe_keys() -> list[Key]:
    return list(_keys(Recipe, ""))


def plugin_keys(table: str, name: str) -> list[Key]:
    return list(_keys(resolve(table, name).Config, f"{table.removesuffix('s')}."))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        nested = _section(field.annotation)
        if nested is None:
            yield Key(prefix + name, _type_name(field.annotation), _default(field), field.description or "")
        elif issubclass(nested, Plugin):
            known = ", ".join(TABLES[nested.table])
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = default.name if isinstance(default, Plugin) else _default(field)
            yield Key(f"{prefix}{name}.name", "str", shown, f"one of {known}; its options stand beside it")
        else:
            yield from _keys(nested, f"{prefix}{name}.")


def _section(annotation: object) -> type[BaseModel] | None:
    """The model behind `X` or `X | None`."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _type_name(annotation: object) -> str:
    if _is_union(annotation):
        return " | ".join(_type_name(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is not None:
        inner = ", ".join("..." if part is ... else _type_name(part) for part in typing.get_args(annotation))
        return f"{_type_name(typing.get_origin(annotation))}[{inner}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _lines(keys: list[Key]) -> list[str]:
    width = max((len(key.name) for key in keys), default=0)
    return [f"{key.name:<{width}}  {key.type:<24}  {key.default:<12}  {key.description}".rstrip() for key in keys]
