"""The keys of a run file, read from the schema, and its mistakes, named by key. Free of torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from base.errors import nearest

Model = type[BaseModel]


def schema_keys(
    model: Model, prefix: str = "", default_of_model: BaseModel | None = None
) -> Iterator[tuple[str, str, str]]:
    """Every key below a model, with its default (the enclosing model's, if that has one) and its meaning."""
    for name, field in model.model_fields.items():
        inner = inner_models(field.annotation)
        named = getattr(field.annotation, "__origin__", None) is dict
        key = f"{prefix}{name}" + (".NAME" if named and inner else "")
        given = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        if default_of_model is not None:
            given = getattr(default_of_model, name)
        required = field.is_required() and default_of_model is None
        yield key, "required" if required else "" if given is None or inner else f"= {given}", field.description or ""
        found: set[str] = set()
        for each in inner:
            # The members of a union share keys.
            below = list(schema_keys(each, f"{key}.", given if isinstance(given, each) else None))
            yield from (row for row in below if row[0] not in found)
            found |= {row[0] for row in below}


def inner_models(annotation: Any) -> list[Model]:
    """The config models behind `Model`, `Model | None`, `One | Other` or `dict[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in inner_models(argument)]


def type_of(model: Model) -> str:
    """The value of `type` that selects a model in a union."""
    (name,) = model.model_fields["type"].annotation.__args__  # type: ignore[union-attr]
    return str(name)


def mistakes(model: Model, error: ValidationError, prefix: str = "") -> list[str]:
    """A line for each mistake: its key, the message, and the nearest valid choice.

    Args:
        model: The model that was validated.
        error: Its error.
        prefix: Where the model stands, such as `merge.variants.NAME.`.
    """
    return [f"{prefix}{_line(model, dict(problem))}" for problem in error.errors()]


def _line(model: Model, problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]] or ["(top level)"]
    last = location[-1]
    where, holders, others = _place(model, location)
    key = ".".join(where)
    match problem["type"]:
        case "extra_forbidden":
            if owners := [type_of(each) for each in others if last in each.model_fields]:
                return f"{key}: belongs to {', '.join(owners)}; the type is {type_of(holders[0])}"
            return f"{key}: unknown key{nearest(last, [name for each in holders for name in each.model_fields])}"
        case "union_tag_not_found" | "union_tag_invalid":
            field = next(each.model_fields[last] for each in holders)
            types = [type_of(each) for each in inner_models(field.annotation)]
            if not isinstance(problem["input"], Mapping) or "type" not in problem["input"]:
                return f"{key}.type: missing; one of {', '.join(types)}"
            tag = str(problem["input"]["type"])
            return f"{key}.type: unknown type '{tag:.60}'{nearest(tag, types)}"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r:.60})"
    return f"{key}: {message}{given}"


def _place(model: Model, location: list[str]) -> tuple[list[str], list[Model], list[Model]]:
    """A mistake's key, the models that hold its last part, and the other types of a union they belong to.

    Pydantic puts the type of a union's member into the location; it is no part of the key.
    """
    where: list[str] = []
    holders: list[Model] = [model]
    others: list[Model] = []
    rest = list(location)
    while rest:
        part = rest.pop(0)
        where.append(part)
        field = next((each.model_fields[part] for each in holders if part in each.model_fields), None)
        if field is None or not rest:
            break
        inner = inner_models(field.annotation)
        if getattr(field.annotation, "__origin__", None) is dict and inner:
            where.append(rest.pop(0))
        others = []
        if len(inner) > 1 and rest:
            tag = rest.pop(0)
            others = [each for each in inner if type_of(each) != tag]
            inner = [each for each in inner if type_of(each) == tag]
        holders = inner
    return [*where, *rest], holders, others
