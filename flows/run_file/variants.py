"""The same merge with other settings, as additional students: `merge.variants`. Free of torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from base.errors import UserError
from flows.run_file.keys import mistakes
from flows.run_file.schema import MergeConfig, RunConfig

# Keys of the merge that a variant may not have.
BESIDE = {"baselines", "variants", "rounds"}


def variant_run(config: RunConfig, name: str) -> RunConfig:
    """The run as it would be if the variant were its merge.

    Args:
        config: The run.
        name: A key of `merge.variants`; its value holds the keys of the merge that differ, mappings merged key by key.
            `teachers` replaces the merge's as a whole: another route is another teacher, not one more.

    Raises:
        UserError: a key or value is wrong; the message names it.
    """
    merge = config.merge
    assert merge is not None
    changes = merge.variants[name]
    if taken := BESIDE & changes.keys():
        raise UserError(f"merge.variants.{name}.{min(taken)}: set this in merge, not in a variant")
    own = {field: getattr(merge, field) for field in merge.model_fields_set - BESIDE}
    own = {field: _plain(value) for field, value in own.items()}
    try:
        routes = {"teachers": changes["teachers"]} if "teachers" in changes else {}
        variant = MergeConfig.model_validate({**overlaid(own, changes), **routes})
    except ValidationError as error:
        raise UserError(mistakes(MergeConfig, error, f"merge.variants.{name}.")[0]) from None
    return config.model_copy(update={"merge": variant})


def _plain(value: Any) -> Any:
    """A setting in the form of the run file, without defaults."""
    return value.model_dump(exclude_unset=True) if hasattr(value, "model_dump") else value


def overlaid(below: Any, above: Any) -> Any:
    """One config merged over another: mappings key by key, other values as a whole.

    A mapping of another `type` replaces the one below, since each type of objective has its own options.
    """
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    types = [each["type"] for each in (below, above) if isinstance(each.get("type"), str)]
    if len(set(types)) > 1:
        return above
    return {**below, **{key: overlaid(below[key], value) if key in below else value for key, value in above.items()}}
