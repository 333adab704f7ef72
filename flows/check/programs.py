"""Checks of stages that a program of the user's own makes."""

import shutil
from collections.abc import Iterator

from flows.check.draws import config_key
from flows.plan.nodes import Node
from stages.config.kinds import STAGES

PYTHON = "{python}"


def program_problems(missing: list[Node]) -> Iterator[str]:
    """Yield an error for each program that this machine does not have."""
    for node in missing:
        if not STAGES[node.stage].launches or (program := node.config["run"][0]) == PYTHON:
            continue
        if shutil.which(program) is None:
            key = config_key(node).removesuffix(".command")
            yield f"{key}.command.run: '{program}' is no program on the PATH; {PYTHON} is the Python that runs mopd"
