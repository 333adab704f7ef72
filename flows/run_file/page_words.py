"""Types, bounds and defaults of the schema in words, for `docs/run-file.md`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from evals.tables.markdown import code, plain


def plain_type(schema: Mapping[str, Any], name: str) -> str:
    """A type that holds no other one."""
    if "const" in schema:
        return code(in_yaml(schema["const"]))
    if "enum" in schema:
        return f"one of {', '.join(code(choice) for choice in schema['enum'])}"
    match schema.get("type"):
        case "string":
            return text_type(schema)
        case "integer" | "number":
            return number_type(schema, name)
        case other:
            return {"boolean": "`true` or `false`", "null": "`null`"}.get(str(other), "any value")


def number_type(schema: Mapping[str, Any], name: str) -> str:
    """A number with its bounds; those of an integer include their ends."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    noun = "share" if (low, high) == (0, 1) or name.endswith("share") else "number"
    if schema["type"] == "integer":
        noun = "integer"
        low, above = low if above is None else above + 1, None
        high, below = high if below is None else below - 1, None
    if low is not None and high is not None:
        return f"{noun} {figure(low)} to {figure(high)}"
    ends = {"≥": low, ">": above, "≤": high, "<": below}
    bounds = " and ".join(f"{sign} {figure(end)}" for sign, end in ends.items() if end is not None)
    return f"{noun} {bounds}" if bounds else noun


def figure(value: float) -> str:
    """A bound without an exponent; commas group the digits of a large one."""
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def text_type(schema: Mapping[str, Any]) -> str:
    size, pattern = size_of(schema, "Length"), schema.get("pattern")
    unit = "" if not size else " character" if size.endswith(" 1") else " characters"
    return f"text{size}{unit}" + (f" that matches {code(pattern)}" if pattern else "")


def size_of(schema: Mapping[str, Any], what: str) -> str:
    """How many items or characters there are, such as ` of 1 to 100`; empty where any number will do."""
    match schema.get(f"min{what}"), schema.get(f"max{what}"):
        case None, None:
            return ""
        case low, None:
            return f" of at least {low}"
        case None, high:
            return f" of at most {high}"
        case low, high:
            return f" of {low}" if low == high else f" of {low} to {high}"


def in_yaml(value: Any) -> str:
    """A default in YAML, on one line; for a model, the keys that differ from the model's own defaults."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        given = {name: getattr(value, name) for name in fields}
        value = {
            name: each
            for name, each in given.items()
            if each != fields[name].get_default(call_default_factory=True, validated_data={})
        }
    dumped = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10**6)
    return dumped.removesuffix("...\n").strip()


def listed(words: Sequence[str], last: str) -> str:
    """Words as a sentence lists them."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def prose(text: str) -> str:
    """The first paragraph of a text; the text between backticks is code."""
    pieces = re.split(r"`([^`]*)`", " ".join(text.partition("\n\n")[0].split()))
    # `plain` would take the spaces beside code away.
    marked = (re.sub(r"\S+", lambda word: plain(word[0]), piece) for piece in pieces[::2])
    quoted = [*map(code, pieces[1::2]), ""]
    return "".join(before + inside for before, inside in zip(marked, quoted, strict=True))
