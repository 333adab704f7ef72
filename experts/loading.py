"""The kinds of domains, and the function that makes a domain from its entry in the run file.

A kind of domain is one module with an `Options` model and a `load(name, options)`; `KINDS` lists the built-in ones, and
a run file may name a Python file (`kind: domains/mine.py`).
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from base.errors import UserError, nearest
from experts.domain import OWN_SUFFIX, Domain, Options
from experts.kinds.noisy import NoisyDomain
from experts.kinds.noisy import Options as NoisyOptions
from experts.own import load_own, own_module

KINDS = {
    "strings": "experts.kinds.strings",
    "reasoning": "experts.kinds.reasoning",
    "code_edit": "experts.kinds.code_edit",
    "hub": "experts.kinds.hub",
    "judge": "experts.kinds.judge",
    "noisy": "experts.kinds.noisy",
}


def load_domain(name: str, kind: str, options: Mapping[str, Any]) -> Domain:
    """Make a domain from its entry in the run file.

    Raises:
        UserError: unknown kind, unknown or invalid option; the message names the key and the nearest valid choice.
    """
    if kind.endswith(OWN_SUFFIX):
        return load_own(name, Path(kind), options, lambda given: check_options(name, kind, given))
    checked = check_options(name, kind, options)
    if isinstance(checked, NoisyOptions):
        return NoisyDomain(load_domain(name, checked.kind, checked.options), checked)
    domain: Domain = _kind_module(name, kind).load(name, checked)
    return domain


def check_options(name: str, kind: str, options: Mapping[str, Any]) -> Options:
    """Validate a domain's options without making the domain (cheap: no dataset is touched)."""
    schema: type[Options] = _kind_module(name, kind).Options
    try:
        return schema.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(_describe(name, schema, error)) from None


def _kind_module(name: str, kind: str) -> Any:
    if kind.endswith(OWN_SUFFIX):
        return own_module(name, Path(kind))
    if kind not in KINDS:
        raise UserError(f"domains.{name}.kind: unknown kind '{kind}'{nearest(kind, KINDS)}")
    return importlib.import_module(KINDS[kind])


def _describe(name: str, schema: type[Options], error: ValidationError) -> str:
    lines: list[str] = []
    for problem in error.errors():
        location: Sequence[Any] = problem["loc"]
        key = ".".join(str(part) for part in location)
        hint = nearest(key, schema.model_fields) if problem["type"] == "extra_forbidden" else ""
        if problem["type"] == "literal_error":
            close = nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
            # If no choice is close, the message already lists all of them.
            hint = close if "did you mean" in close else ""
        message = (
            "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        )
        lines.append(f"domains.{name}.options.{key}: {message}{hint}")
    return "\n".join(lines)
