"""Check that a record read from a file has the types its fields are declared with."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any


def first_mismatch(value: Any, declared: Any = None, place: str = "report") -> str:
    """Where `value` is not of type `declared`, in words; empty when it is. Data classes are checked field by field."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if declared is not None and isinstance(declared, type) and not isinstance(value, declared):
            return f"{place} is a {type(value).__name__}"
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            wrong = first_mismatch(getattr(value, field.name), hints[field.name], f"{place}.{field.name}")
            if wrong:
                return wrong
        return ""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any:
        return ""
    if origin in (typing.Union, types.UnionType):
        found = [first_mismatch(value, option, place) for option in inner]
        return "" if "" in found else found[0]
    if isinstance(value, dict):
        if origin is not dict and declared is not dict:
            return f"{place} is an object"
        kinds = inner or (Any, Any)
        for key, item in value.items():
            wrong = first_mismatch(key, kinds[0], f"a key of {place}") or first_mismatch(
                item, kinds[1], f"{place}[...]"
            )
            if wrong:
                return wrong
        return ""
    if isinstance(value, (list, tuple, frozenset)):
        if declared is not None and origin not in (list, tuple, frozenset):
            return f"{place} is a list"
        kind = inner[0] if inner else None
        for number, item in enumerate(value):
            wrong = first_mismatch(item, kind, f"{place}[{number}]")
            if wrong:
                return wrong
        return ""
    if declared is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif declared is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    elif declared is type(None):
        right = value is None
    else:
        right = declared is None or (isinstance(declared, type) and isinstance(value, declared))
    return "" if right else f"{place} is {str(value)[:60]!r}, not {getattr(declared, '__name__', declared)}"
