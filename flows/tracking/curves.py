"""Learning curves in MLflow: a monitored student's scores by step, with those of its start and teachers as constants.

The metrics of a domain share a prefix, `curve/DOMAIN/`, by which MLflow groups its charts: `student` (or `expert`),
`start` and `teacher`. All are measured on the monitor's examples, so that the lines are comparable.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from base.store.checkpoint import Artifact
from evals.comparison.scores import read_scores
from experts.domain import HELD_OUT
from flows.plan.nodes import Node, StageGraph
from stages.config.on_policy import HISTOGRAM
from stages.config.roles import teachers_of_domain

CURVE = "curve"
ROLES = ("student", "teacher", "start")
MONITORED = re.compile(r"(\w+)/score/(.+)")
Values = list[tuple[str, float, int, int]]


def tracked_name(name: str) -> str | None:
    """The name in MLflow of a stage's metric. None for a bin of a histogram, which is in `report.json` only."""
    if f"/{HISTOGRAM}" in name:
        return None
    monitored = MONITORED.fullmatch(name)
    if monitored is None:
        return name
    return f"{CURVE}/{monitored[2]}/{'student' if monitored[1] == 'distill' else 'expert'}"


def tracked(metrics: Mapping[str, float]) -> dict[str, float]:
    """A stage's metrics under their names in MLflow; see `tracked_name`."""
    return {renamed: value for name, value in metrics.items() if (renamed := tracked_name(name)) is not None}


def teacher_of(node: Node, domain: str) -> str | None:
    """Id of the checkpoint that teaches a student a domain: the one with the largest weight, or the first of equals."""
    names = teachers_of_domain(node.parents, domain)
    weights = node.config.get("teacher_weights", {}).get(domain, {})
    best = max(names, key=lambda role: weights.get(names[role], 0.0), default=None)
    return node.parents[best] if best else None


class References:
    """Logs the constant lines of the run's monitored stages. Its methods may be called from several threads.

    A line is logged when its stage has begun and its checkpoint has been scored, in either order.
    """

    def __init__(self, graph: StageGraph, log: Callable[[str, Values], None], now: Callable[[], int]) -> None:
        """Log nothing yet.

        Args:
            graph: The planned run.
            log: Called with a node's id and (name, value, milliseconds, step) for its run.
            now: Milliseconds since the epoch.
        """
        self._log, self._now = log, now
        self._monitored = [node for node in graph.checkpoints if node.config.get("monitor")]
        self._lock = threading.Lock()
        self._begun: dict[str, Node] = {}
        self._sheets: dict[tuple[str, str], Artifact] = {}

    def begin(self, node: Node) -> None:
        """Log the lines of a stage that begins, as far as their scores exist."""
        if node not in self._monitored:
            return
        with self._lock:
            self._begun[node.id] = node
            sheets = dict(self._sheets)
        self._draw(node, sheets)

    def score(self, node: Node, artifact: Artifact) -> None:
        """Log the line of a newly scored checkpoint for the stages that have begun.

        Args:
            node: The evaluation.
            artifact: Its score sheet.
        """
        if node.stage != "evaluate" or node.config["split"] != HELD_OUT:
            return
        checkpoint, domain = node.parents["checkpoint"], str(node.config["domain"])
        if not any(each[:2] == (checkpoint, domain) for own in self._monitored for each in _lines(own)):
            return
        with self._lock:
            self._sheets[checkpoint, domain] = artifact
            begun = list(self._begun.values())
        for own in begun:
            self._draw(own, {(checkpoint, domain): artifact})

    def _draw(self, node: Node, sheets: Mapping[tuple[str, str], Artifact]) -> None:
        examples, last = int(node.config["monitor"]["examples"]), int(node.config["max_steps"])
        for checkpoint, domain, role in _lines(node):
            if (sheet := sheets.get((checkpoint, domain))) is not None:
                # The monitor and the evaluation draw the same examples in the same order.
                shown_N = read_scores(sheet.path, domain, HELD_OUT).greedy_N[:examples]
                score, name, time = fmean(shown_N), f"{CURVE}/{domain}/{role}", self._now()
                self._log(node.id, [(name, score, time, 0), (name, score, time, last)])


def _lines(node: Node) -> Iterator[tuple[str, str, str]]:
    """Checkpoint, domain and role of each constant line of a stage."""
    for domain in node.domains:
        if "start" in node.parents:
            yield node.parents["start"], domain, "start"
        if (teacher := teacher_of(node, domain)) is not None:
            yield teacher, domain, "teacher"
