"""The JSON schema of a results file, from the dataclasses of `profiling.results` and the comments beside their fields.

`python -m profiling.schema` prints it; profiling/results.schema.json is what it printed last.
"""

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from profiling import results
from profiling.results import HIGH, SCHEMA, VERSION, Run, as_json_text

SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number", "exclusiveMinimum": -HIGH, "exclusiveMaximum": HIGH},
}


def results_schema() -> dict[str, Any]:
    """The schema as JSON values, in draft 2020-12."""
    definitions: dict[str, Any] = {}
    _define(Run, definitions)
    run = definitions.pop("Run")
    envelope = {"schema": {"const": SCHEMA}, "version": {"const": VERSION}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{SCHEMA}, version {VERSION}",
        **run,
        "description": inspect.cleandoc(results.__doc__ or ""),
        "properties": envelope | run["properties"],
        "required": [*envelope, *run["required"]],
        "$defs": definitions,
    }


def _define(cls: type, definitions: dict[str, Any]) -> None:
    """Adds the definition of a dataclass, and of those that it contains."""
    definitions[cls.__name__] = {}  # holds the place, so that definitions stand in the order of their use
    hints, comments = typing.get_type_hints(cls), _comments(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        about = {"description": comments[field.name]} if field.name in comments else {}
        properties[field.name] = about | _of_type(hints[field.name], definitions)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    definitions[cls.__name__] = {
        "description": inspect.cleandoc(cls.__doc__ or ""),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a class, by the field's name."""
    return dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", inspect.getsource(cls), re.MULTILINE))


def _of_type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return {"anyOf": [_of_type(arguments[0], definitions), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _of_type(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(arguments[1], definitions)}
    if dataclasses.is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        if name not in definitions:
            _define(typing.cast(type, hint), definitions)
        return {"$ref": f"#/$defs/{name}"}
    return SCALARS[hint]


if __name__ == "__main__":
    print(as_json_text(results_schema()))
