"""What a scheduled run may change of its run file: the file's own schema, so that a page can check it. Torch-free."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from flows.config import RunConfig

DEFINITIONS = "$defs"


def partial_schema() -> dict[str, Any]:
    """The run file's JSON schema for changes, which name only what differs; references resolved.

    Nothing is required, and no default is named, or a form that fills defaults in would lay them over the run file.
    """
    whole = RunConfig.model_json_schema()
    definitions = whole.pop(DEFINITIONS)

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        if "$ref" in value:
            beside = {key: each for key, each in value.items() if key != "$ref"}
            return resolved({**definitions[value["$ref"].rpartition("/")[2]], **beside})
        return {key: resolved(each) for key, each in value.items() if key not in ("required", "default")}

    schema: dict[str, Any] = resolved(whole)
    # The name is that of the champion and of everything kept: another name is another deployment.
    del schema["properties"]["name"]
    return schema | {"title": "changes", "description": "Keys of the run file that differ in this run."}


Changes = Annotated[dict[str, Any], WithJsonSchema(partial_schema())]


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """Nested changes as dotted assignments, as `flows.run_file.load_run_file` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in _leaves(changes)]


def _leaves(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
