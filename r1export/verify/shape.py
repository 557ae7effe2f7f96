"""Whether a JSON value has the shape that a JSON Schema asks for: the keywords that report.schema.json uses, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}
Schema = Mapping[str, Any]


def misfit(value: Any, schema: Schema, place: str = "") -> str:
    """The first thing that does not fit, with its place below `place`; empty if all does."""
    return next(_misfits(value, schema, schema, place), "")


def _misfits(value: Any, schema: Schema, root: Schema, place: str) -> Iterator[str]:
    for keyword, wanted in schema.items():
        if keyword == "$ref":
            yield from _misfits(value, _definition(root, wanted), root, place)
        elif keyword == "allOf":
            for part in wanted:
                yield from _misfits(value, part, root, place)
        elif keyword == "anyOf" and all(any(_misfits(value, part, root, place)) for part in wanted):
            yield from _misfits(value, wanted[0], root, place)
        elif problem := _wrong(value, keyword, wanted):
            yield f"{place or 'it'} {problem}"
    yield from _inside(value, schema, root, place)


def _definition(root: Schema, reference: str) -> Schema:
    """`#` is the whole schema, `#/$defs/NAME` a part of it."""
    return root["$defs"][reference.removeprefix("#/$defs/")] if reference != "#" else root


def _wrong(value: Any, keyword: str, wanted: Any) -> str:
    if keyword == "type" and not any(_is(value, name) for name in _listed(wanted)):
        return f"is {value!r:.80}, expected {' or '.join(_listed(wanted))}"
    if keyword == "const" and value != wanted:
        return f"is {value!r:.80}, expected {wanted!r}"
    if keyword == "enum" and value not in wanted:
        return f"is {value!r:.80}, expected one of {', '.join(str(word) for word in wanted if word)}"
    if (
        keyword == "required"
        and isinstance(value, dict)
        and (missing := [name for name in wanted if name not in value])
    ):
        return f"lacks {', '.join(missing)}"
    number = value if _is(value, "number") else None
    length = len(value) if isinstance(value, list) else None
    for low, high, found in (("minimum", "maximum", number), ("minItems", "maxItems", length)):
        if found is not None and ((keyword == low and found < wanted) or (keyword == high and found > wanted)):
            return f"is {value!r:.80}, out of range"
    return ""


def _inside(value: Any, schema: Schema, root: Schema, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        named, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, part in value.items():
            if (inner := named.get(key, others)) is not None:
                yield from _misfits(part, inner, root, f"{place}.{key}".lstrip("."))
    if isinstance(value, list) and "items" in schema:
        for i, part in enumerate(value):
            yield from _misfits(part, schema["items"], root, f"{place}[{i}]")


def _is(value: Any, name: str) -> bool:
    """True is no number, although Python says so."""
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names
