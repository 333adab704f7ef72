"""Learning curves in MLflow: a monitored student's scores by step, its start's and teachers' as constant lines beside.

The metrics of a domain share a prefix, `curve/DOMAIN/`, by which MLflow groups its charts: `student` (or `expert`),
`start` and `teacher`. All are of the monitor's examples, so that the lines can be compared.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from base.store.checkpoint import Artifact
from evals.comparison.scores import read_scores
from experts.domain import HELD_OUT
from flows.plan.graph import Node, StageGraph
from stages.config.on_policy import HISTOGRAM

CURVE = "curve"
ROLES = ("student", "teacher", "start")
MONITORED = re.compile(r"(\w+)/score/(.+)")
Values = list[tuple[str, float, int, int]]


def tracked_name(name: str) -> str | None:
    """The name of a stage's metric in MLflow; None for a bin of a histogram, which only `report.json` has."""
    if f"/{HISTOGRAM}" in name:
        return None
    monitored = MONITORED.fullmatch(name)
    if monitored is None:
        return name
    return f"{CURVE}/{monitored[2]}/{'student' if monitored[1] == 'distill' else 'expert'}"


def tracked(metrics: Mapping[str, float]) -> dict[str, float]:
    """A stage's metrics as MLflow has them; see `tracked_name`."""
    return {known: value for name, value in metrics.items() if (known := tracked_name(name)) is not None}


def teacher_of(node: Node, domain: str) -> str | None:
    """Id of the checkpoint that teaches a student a domain: of several the heaviest, of equals the first."""
    prefix = f"teacher/{domain}"
    roles = [role for role in node.parents if role == prefix or role.startswith(f"{prefix}/")]
    weights = node.config.get("teacher_weights", {}).get(domain, {})
    best = max(roles, key=lambda role: weights.get(role.removeprefix(f"{prefix}/"), 0.0), default=None)
    return node.parents[best] if best else None


class References:
    """The constant lines of the run's monitored stages; its methods may be called from several threads.

    A line is logged once its stage has begun and its checkpoint is scored, whichever comes last.
    """

    def __init__(self, graph: StageGraph, log: Callable[[str, Values], None], now: Callable[[], int]) -> None:
        """Log nothing yet.

        Args:
            graph: The planned run.
            log: Takes a node's id and (name, value, milliseconds, step) of its run.
            now: Milliseconds since the epoch.
        """
        self._log, self._now = log, now
        self._monitored = [node for node in graph.checkpoints if node.config.get("monitor")]
        self._lock = threading.Lock()
        self._begun: dict[str, Node] = {}
        self._sheets: dict[tuple[str, str], Artifact] = {}

    def begin(self, node: Node) -> None:
        """A stage begins: log the lines whose scores are there."""
        if node not in self._monitored:
            return
        with self._lock:
            self._begun[node.id] = node
            sheets = dict(self._sheets)
        self._draw(node, sheets)

    def score(self, node: Node, artifact: Artifact) -> None:
        """A checkpoint is scored: log its line at the stages that have begun.

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
                # Both draw the same examples in the same order.
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
