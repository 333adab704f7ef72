"""The form of Prefect's *Custom run* for a deployed run: a few fields, and overrides as on the command line.

No field has a default, so that empty fields keep the run file's values. Torch-free.

"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from base.errors import UserError, nearest
from flows.run_file.schema import RunConfig

ASSIGNMENT = re.compile(r"[\w./-]+\s*=")
SEEDS, MERGE, EXPERTS, CAP, OVERRIDES = "seeds", "merge_max_steps", "expert_max_steps", "max_steps", "overrides"


def form_schema(config: RunConfig) -> dict[str, Any]:
    """The form's JSON schema, with the current values in its texts.

    It has only text and whole numbers: the flow checks their meaning, with the messages of the command line.

    Args:
        config: The deployed run.
    """
    fields: dict[str, dict[str, Any]] = {
        SEEDS: _text(f"Such as 0, 1, 2. Empty: as in the run file ({_listed(config.seeds)} when deployed)."),
    }
    if config.merge:
        fields[MERGE] = _number(f"Steps of the merge. {_empty(config.merge.max_steps)}")
    if trained := _steps(config):
        fields[EXPERTS] = {
            "type": "object",
            "description": "Steps of each expert.",
            "properties": {name: _number(_empty(steps)) | {"title": name} for name, steps in trained.items()},
        }
    fields[CAP] = _number("No stage takes more steps than this, for a small trial of the run. Empty: no cap.")
    fields[OVERRIDES] = {
        "type": "array",
        "items": {"type": "string"},
        "description": f"Any key as on the command line: {_example(config)}. `mopd --help-config` lists them.",
    }
    for position, (name, entry) in enumerate(fields.items()):
        fields[name] = {"title": name, "position": position} | entry
    return {"type": "object", "title": "Parameters", "properties": fields, "required": []}


def form_overrides(config: RunConfig, seeds: Any, merge_max_steps: Any, expert_max_steps: Any) -> list[str]:
    """The form's entries as dotted assignments, as `flows.run_file.load.load_run_file` takes them.

    Args:
        config: The run without them.
        seeds: Text such as `0, 1, 2`, or a list; empty or None keeps the run's values, also for the next two.
        merge_max_steps: A number.
        expert_max_steps: Expert -> number.

    Raises:
        UserError: an entry names an expert or a merge that the run does not have.
    """
    found: list[str] = []
    if seeds not in (None, "", []):
        text = _listed(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else str(seeds).strip()
        found.append(f"{SEEDS}={text}" if text.startswith("[") else f"{SEEDS}=[{text}]")
    if merge_max_steps not in (None, ""):
        if config.merge is None:
            raise UserError(f"{MERGE}: the run has no merge")
        found.append(f"merge.max_steps={merge_max_steps}")
    if not isinstance(expert_max_steps or {}, Mapping):
        raise UserError(f"{EXPERTS}: name each expert with its steps, such as {{sort: 3}}")
    trained = _steps(config)
    for name, steps in (expert_max_steps or {}).items():
        if steps in (None, ""):
            continue
        if name not in trained:
            raise UserError(f"{EXPERTS}: '{name}' is no expert that the run trains{nearest(name, trained)}")
        train = config.experts[name].train
        assert train is not None
        found.append(f"experts.{name}.train.{train.chosen[0]}.max_steps={steps}")
    return found


def as_lines(overrides: Any) -> list[str]:
    """A list of overrides as dotted assignments; an entry of the form may have several, one per line."""
    found: list[str] = []
    for entry in [overrides] if isinstance(overrides, str) else overrides or []:
        lines = [line.strip() for line in str(entry).splitlines() if line.strip()]
        # A value may itself have several lines.
        found += lines if all(ASSIGNMENT.match(line) for line in lines) else [str(entry)]
    return found


def _steps(config: RunConfig) -> dict[str, int]:
    """Expert -> steps, for the trained experts."""
    return {name: expert.train.chosen[1].max_steps for name, expert in config.experts.items() if expert.train}


def _example(config: RunConfig) -> str:
    if config.merge:
        for name, expert in config.experts.items():
            return f"merge.teachers={{{expert.domain}: {name}}}"
    return "evaluate.examples=100"


def _empty(value: int) -> str:
    return f"Empty: as in the run file ({value} when deployed)."


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _number(description: str) -> dict[str, Any]:
    return {"type": "integer", "description": description}
