"""The settings of a run that the advice at its end uses: steps, margins, examples, and the course of the entropy."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, read
from flows.plan.nodes import Node, StageGraph
from flows.run.last_run import newest_of, words
from flows.run_file.schema import CHAMPION, STUDENT

if TYPE_CHECKING:
    from evals.promotion.advice import Settings

# The fraction of a training at its beginning and at its end over which the mean entropy is compared.
END_SHARE = 0.1


def settings_of(graph: StageGraph, store: Store, candidate: Node | None, command: str = "") -> "Settings":
    """The settings of a run.

    Args:
        graph: The run.
        store: The store of its artifacts, whose home has the journals of its stages.
        candidate: The merge that the gate judges; None without a merge.
        command: The command line that makes the run; by default that of its last run.
    """
    from evals.promotion.advice import Settings

    config = graph.config
    steps = {STUDENT: ("merge.max_steps", config.merge.max_steps)} if config.merge else {}
    for name, expert in config.experts.items():
        if expert.train:
            method, own = expert.train.chosen
            steps[f"experts/{name}"] = (f"experts.{name}.train.{method}.max_steps", own.max_steps)
    return Settings(
        command=command or _last_command(store.home, config.name),
        margin=config.gate.non_inferiority_margin,
        max_forgetting=config.gate.max_forgetting,
        examples=config.evaluate.examples,
        confidence=config.gate.confidence,
        max_new_tokens=config.evaluate.max_new_tokens,
        steps=steps,
        entropy=_entropies(store, candidate) if candidate else {},
        from_champion=config.merge is not None and config.merge.start_from == CHAMPION,
    )


def command_line(file: Path, overrides: tuple[str, ...], max_steps: int | None) -> str:
    """`mopd run` with these arguments. The path of a file below the working folder is relative to it."""
    near = file.is_relative_to(Path.cwd())
    return shlex.join(["mopd", "run", os.path.relpath(file) if near else str(file), *words(overrides, max_steps)])


def _last_command(home: Path, run: str) -> str:
    found = newest_of(home, run)
    return command_line(found[0], found[1].overrides, found[1].max_steps) if found else "mopd run"


def _entropies(store: Store, candidate: Node) -> Mapping[tuple[str, str], tuple[float, float]]:
    """(checkpoint, domain) -> mean token entropy of the first and of the last `END_SHARE` of its training's records."""
    journal = store.home / "work" / candidate.key / JOURNAL_FILE
    found: dict[str, list[float]] = {}
    for record in read(journal, ("metrics",)) if journal.exists() else ():
        for name, value in record["values"].items():
            stage, _, rest = name.partition("/")
            if stage == candidate.stage and rest.startswith("entropy/"):
                found.setdefault(rest.partition("/")[2], []).append(value)
    ends = {domain: max(1, round(END_SHARE * len(values))) for domain, values in found.items()}
    return {
        (candidate.name, domain): (fmean(values[: ends[domain]]), fmean(values[-ends[domain] :]))
        for domain, values in found.items()
    }
