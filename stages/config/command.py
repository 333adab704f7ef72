"""The config of a stage that a program of the user's own makes. Free of torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from base.errors import nearest
from base.hashing import stable_hash
from base.store.checkpoint import hash_file
from stages.config.training import NOT_IN_KEY, Positive, Steps, StrictModel, each_once

# What an argument of the program may name in braces; the same values are in its environment, as MOPD_START and so on.
PLACES = ("python", "start", "data", "teachers", "out", "work", "seed", "max_steps")
Word = Annotated[str, Field(min_length=1, max_length=10_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]


class CommandConfig(StrictModel):
    """A program of your own that reads a Hugging Face checkpoint and writes one."""

    run: list[Word] = Field(
        min_length=1,
        description="The program and its arguments, such as ['{python}', train.py, --model, '{start}', --out, "
        f"'{{out}}']. Names in braces are replaced: {', '.join(PLACES)}; {{{{ and }}}} are braces.",
    )
    files: list[Word] = Field(
        default_factory=list,
        description="Files of the program, from the run file's folder; their contents are part of the content key.",
    )
    environment: list[Name] = Field(
        default_factory=list,
        description="Environment variables that change the result; a hash of their values is part of the content key.",
    )
    examples: Positive = Field(
        3000, description="Distinct training examples of each domain in `data`; all if its data have fewer."
    )
    max_steps: Steps = Field(100, description="A number of steps that the program receives as `max_steps`.")
    progress: str | None = Field(
        None,
        description="Regular expression for lines of the program's output, with the named groups `step`, `total` "
        "(optional) and one for each metric; when absent, lines that are JSON objects are read.",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="before")
    @classmethod
    def _names_each_once(cls, value: Any) -> Any:
        if isinstance(value, dict):
            each_once(value.get("environment"))
            files = value.get("files")
            # The content key has their names.
            each_once([Path(file).name for file in files if isinstance(file, str)] if isinstance(files, list) else None)
        return value

    @field_validator("run")
    @classmethod
    def _names_known_places(cls, value: list[str]) -> list[str]:
        for word in value:
            try:
                names = [name for _, name, _, _ in Formatter().parse(word) if name is not None]
            except ValueError as error:
                raise ValueError(f"{word!r:.60}: {error}; write {{{{ or }}}} for a brace") from None
            if unknown := next((name for name in names if name not in PLACES), None):
                raise ValueError(
                    f"{word!r:.60}: '{{{unknown}}}' is none of {', '.join(PLACES)}{nearest(unknown, PLACES)}; "
                    "write {{ and }} for braces"
                )
        if not any("{out}" in word for word in value[1:]):
            raise ValueError("no argument has '{out}', the folder for the checkpoint that the program writes")
        return value

    @field_validator("progress")
    @classmethod
    def _has_a_step(cls, value: str | None) -> str | None:
        if value is None:
            return value
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"{value!r:.60} is no regular expression: {error}") from None
        if "step" not in groups:
            raise ValueError("name a group `step`: (?P<step>\\d+)")
        return value

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result; files count by their names, wherever they are."""
        values = super().key_fields()
        names = {file: Path(file).name for file in self.files}
        return {**values, "run": [names.get(word, word) for word in self.run], "files": list(names.values())}

    def contents(self) -> dict[str, str]:
        """Name -> hash of the contents of each file.

        Raises:
            OSError: a file cannot be read.
        """
        return {Path(file).name: hash_file(Path(file)) for file in self.files}

    def variables(self, environment: Mapping[str, str]) -> dict[str, str | None]:
        """Name -> hash of the value of each named variable; None for a variable that is not set."""
        found = {name: environment.get(name) for name in self.environment}
        return {name: None if value is None else stable_hash([name, value]) for name, value in found.items()}


class MergeCommandConfig(CommandConfig):
    """A program of your own that merges teachers into a student.

    Attributes:
        teacher_weights: domain -> teacher -> weight where several teach it; from `merge.teachers`.
    """

    teacher_weights: dict[str, dict[str, float]] = Field(default_factory=dict)
