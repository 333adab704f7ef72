"""Which run a command is about."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from flows.plan.graph import StageGraph, build_graph
from flows.run.last_run import last_run, words
from flows.run_file.load import load_run_file


@dataclass(frozen=True)
class RunRequest:
    """Which run is meant.

    Attributes:
        file: The run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        home: `$MOPD_HOME`.
    """

    file: Path
    overrides: tuple[str, ...]
    max_steps: int | None
    home: Path

    def graph(self, faults: list[str] | None = None) -> StageGraph:
        """The run's graph.

        Args:
            faults: Gets the message of a lock that is damaged; None raises.

        Raises:
            UserError: a mistake in the run file.
        """
        return build_graph(load_run_file(self.file, list(self.overrides), self.max_steps), self.home, faults)

    @classmethod
    def last(
        cls, file: Path, overrides: tuple[str, ...], max_steps: int | None, home: Path, as_written: bool = False
    ) -> "RunRequest":
        """The run with these overrides; without any the last one of this file, with a word on what that had.

        Args:
            file: The run file.
            overrides: Dotted assignments to its keys.
            max_steps: Cap on the steps of every stage.
            home: `$MOPD_HOME`.
            as_written: The file as it is, whatever its last run had.
        """
        found = None if overrides or max_steps or as_written else last_run(home, file)
        if found is None or not (found.overrides or found.max_steps):
            return cls(file, overrides, max_steps, home)
        had = shlex.join(words(found.overrides, found.max_steps))
        sys.stderr.write(f"as in the last run of {file}: {had} (--as-written leaves this out)\n")
        return cls(file, found.overrides, found.max_steps, home)

    @property
    def command(self) -> str:
        """The command line that runs it again."""
        asked = words(self.overrides, self.max_steps)
        return shlex.join(["mopd", "run", str(self.file), *asked, "--home", str(self.home)])
