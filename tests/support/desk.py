"""A desk at which a run file is written and commands are called in this process; nothing may be started at it."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typer.testing import CliRunner, Result

from flows.cli.app import app
from tests.unit.flows.run_file.test_config import MINIMAL

MISTAKE = 2
RL = "experts.sort.train.rl"
FEW = {
    "base": {"pretrain": {"max_steps": 5, "examples": 20}},
    "cold_start": {"sft": {"max_steps": 5, "examples": 20}},
    "experts": {
        "sort": {"domain": "sort", "train": {"rl": {"max_steps": 5, "examples": 20}}},
        "reverse": {"domain": "reverse", "train": {"sft": {"max_steps": 5, "examples": 20}}},
    },
    "merge": {"max_steps": 5, "examples": 20, "anchor": {"domains": ["general"]}},
    "evaluate": {"shift": None, "examples": 5},
}
RUN: dict[str, Any] = MINIMAL | FEW
# A checkpoint from elsewhere, and one expert.
IMPORTED: dict[str, Any] = {
    "name": "tiny",
    "base": {"checkpoint": "given"},
    "domains": {"sort": {"kind": "strings", "options": {"task": "sort"}}},
    "experts": {"sort": {"domain": "sort", "train": {"sft": {"max_steps": 1, "examples": 5, "batch_size": 1}}}},
    "evaluate": {"shift": None, "examples": 5},
}
# What a run that starts something leaves in its home.
TRACES = ("work", "servers", "prefect.db", "mlflow.db", "mlflow", "prefect", "runs/tiny")


class Desk:
    """A folder with a run file and a home of which nothing is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "run.yaml"
        self.home = folder / "home"

    def write(self, run: Any) -> None:
        self.file.write_text(run if isinstance(run, str) else yaml.safe_dump(run, sort_keys=False))

    def call(self, *arguments: str) -> Result:
        command, *others = arguments
        return CliRunner().invoke(app, [command, str(self.file), *others, "--home", str(self.home)])

    def refuses(self, *arguments: str, names: tuple[str, ...]) -> None:
        """See that a command ends with exit code 2 and one message that holds all names, and leaves no trace."""
        done = self.call(*arguments)
        said = done.stderr
        assert done.exit_code == MISTAKE, (done.exit_code, done.exception, said)
        assert isinstance(done.exception, SystemExit)
        assert said.count("error: ") == 1 and "Traceback" not in said, said
        for name in names:
            assert name in said, said
        if self.home.is_dir():
            left = [trace for trace in TRACES if (self.home / trace).exists()]
            assert left == [] and list((self.home / "store").iterdir()) == []


class Value(NamedTuple):
    """An override, and what its message names."""

    override: str
    names: tuple[str, ...]
