"""From pydantic's errors to one DareError that names each key, what is wrong and the closest right key."""

from __future__ import annotations

import types
import typing

from pydantic import BaseModel, ValidationError

from dare.core.errors import DareError, closest_name


def explain(error: ValidationError, model: type[BaseModel], *, where: str, what: str = "the recipe is") -> DareError:
    """One line per wrong key; `what` begins the sentence."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_closest(item['loc'], model)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = item["input"]
            shown = "" if isinstance(got, dict | BaseModel) else f", got {got!r}"
            lines.append(f"{key}: {message}{shown}" if key else message)
    first, *more = lines
    if not more:
        return DareError(f"{what} wrong at {first}", where=where)
    listed = "\n".join(f"  - {line}" for line in lines)
    return DareError(f"{what} wrong in {len(lines)} places\n{listed}", where=where)


def _closest(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    fields = _fields_at(location[:-1], model)
    close = closest_name(str(location[-1]), fields)
    if close is not None:
        return f"; did you mean '{close}'?"
    return f"; known keys: {', '.join(fields)}" if fields else ""


def _fields_at(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """Field names of the model that `location` leads to."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):  # a place in a list of what the field before holds
            continue
        field = current.model_fields.get(str(part)) if current is not None else None
        current = _model_in(field.annotation) if field is not None else None
    return list(current.model_fields) if current is not None else []


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list):
        for option in typing.get_args(annotation):
            found = _model_in(option)
            if found is not None:
                return found
    return None
