"""The run that a command refers to."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run.last_run import last_run, words
from flows.run_file.load import load_run_file


@dataclass(frozen=True)
class RunRequest:
    """A run file with the options of a command.

    Attributes:
        file: The run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        home: `$MOPD_HOME`.
        ignore_memory: Whether a stage that is estimated not to fit is started all the same.
    """

    file: Path
    overrides: tuple[str, ...]
    max_steps: int | None
    home: Path
    ignore_memory: bool = False

    def graph(self, faults: list[str] | None = None) -> StageGraph:
        """The run's graph.

        Args:
            faults: Receives the message of a damaged lock; None raises it instead.

        Raises:
            UserError: a mistake in the run file.
        """
        return build_graph(load_run_file(self.file, list(self.overrides), self.max_steps), self.home, faults)

    @classmethod
    def last(
        cls, file: Path, overrides: tuple[str, ...], max_steps: int | None, home: Path, as_written: bool = False
    ) -> "RunRequest":
        """The run with these overrides; without any, the file's last run, whose overrides are printed.

        Args:
            file: The run file.
            overrides: Dotted assignments to its keys.
            max_steps: Cap on the steps of every stage.
            home: `$MOPD_HOME`.
            as_written: Use the file without the overrides of its last run.
        """
        found = None if overrides or max_steps or as_written else last_run(home, file)
        if found is None or not (found.overrides or found.max_steps):
            return cls(file, overrides, max_steps, home)
        had = shlex.join(words(found.overrides, found.max_steps))
        sys.stderr.write(f"with the overrides of the last run of {file}: {had} (--as-written ignores them)\n")
        return cls(file, found.overrides, found.max_steps, home)

    @property
    def command(self) -> str:
        """The command line that repeats the run."""
        options = words(self.overrides, self.max_steps)
        ignoring = ["--ignore-memory"] if self.ignore_memory else []
        return shlex.join(["mopd", "run", str(self.file), *options, *ignoring, "--home", str(self.home)])
