"""Reads the results of `objectives.py` from the store and journals: figures, table, ratios."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from base.errors import UserError
from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, read
from evals.comparison.results import Results
from evals.measure.evaluate import EXAMPLES_SEED
from evals.statistics.interval import Interval
from experts.domain import HELD_OUT
from experts.loading import load_domain
from flows.champion.results import collect
from flows.plan.nodes import Node, StageGraph
from flows.run_file.schema import STUDENT

RECOVERED = (0.5, 0.8)
LAST_STEPS = 25
ABSENT = "–"


@dataclass(frozen=True)
class Course:
    """How one student's training went, read from its journal.

    Attributes:
        curve: Steps done -> mean monitored score over the experts' domains; 0 is the start.
        step_seconds: Seconds of each step: rollout, signal and update.
        entropy: Nats a token, mean over the experts' domains, of each step.
    """

    curve: dict[int, float]
    step_seconds: list[float]
    entropy: list[float]


@dataclass(frozen=True)
class Outcome:
    """One variant over its seeds.

    Attributes:
        results: Its scores.
        courses: seed -> how its training went; seeds not finished are absent.
        teachers: seed -> mean score of the teachers on the monitored examples of their own domains.
    """

    name: str
    results: Results
    courses: dict[int, Course]
    teachers: dict[int, float]

    @property
    def seconds(self) -> float:
        """Seconds of one student's steps, mean over seeds."""
        return statistics.fmean(sum(course.step_seconds) for course in self.courses.values())

    @property
    def step_seconds(self) -> float:
        """Seconds of one step: the median over steps, mean over seeds."""
        return statistics.fmean(statistics.median(course.step_seconds) for course in self.courses.values())

    @property
    def entropy(self) -> float:
        """Nats a token in the last steps, mean over seeds."""
        return statistics.fmean(statistics.fmean(course.entropy[-LAST_STEPS:]) for course in self.courses.values())

    def recovered_at(self, share: float) -> int | None:
        """First monitored step at which the seeds' mean curve has passed a share of the teachers' gain."""
        curves = [course.curve for course in self.courses.values()]
        steps = set(curves[0]).intersection(*curves)  # A stage may stop early.
        mean = {step: statistics.fmean(curve[step] for curve in curves) for step in steps}
        start, teacher = mean[0], statistics.fmean(self.teachers.values())
        target = start + share * (teacher - start)
        return next((step for step in sorted(mean) if mean[step] >= target), None) if teacher > start else None


def read_outcome(name: str, graph: StageGraph, store: Store) -> Outcome | None:
    """A variant's results so far; None before its first student is scored.

    Raises:
        UserError: a student was trained without a monitor, or on examples the evaluation does not hold.
    """
    results = collect(graph, store)
    courses, teachers = {}, {}
    for node in graph.checkpoints:
        if node.name == STUDENT and all(store.find(sheet.key) for sheet in sheets(graph, node)):
            courses[node.seed] = _course(store, node, results.expert_domains)
            teachers[node.seed] = _monitored_teachers(graph, results, node.seed)
    return Outcome(name, results, courses, teachers) if courses else None


def sheets(graph: StageGraph, checkpoint: Node) -> list[Node]:
    """The evaluations the table needs: held out, an expert on its own domain, others on all."""
    own = graph.config.experts.get(checkpoint.name.removeprefix("experts/"))
    held_out = [sheet for sheet in graph.evaluations(checkpoint.id) if sheet.config["split"] == HELD_OUT]
    return [sheet for sheet in held_out if own is None or sheet.config["domain"] == own.domain]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: start and teachers, then a row for each variant."""
    results = outcomes[0].results
    heads = [
        *results.domains,
        "mean",
        "recovery",
        *(f"steps to {share:.0%}" for share in RECOVERED),
        "seconds",
        "entropy",
    ]
    lines = [f"| objective | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, role in (("start", results.start), ("teacher", "teacher")):
        cells = [_percent(results.score(role, domain)) for domain in results.domains]
        lines.append(_row(title, [*cells, _percent(results.mean_score(role)), *[ABSENT] * (3 + len(RECOVERED))]))
    for outcome in outcomes:
        results, seeds = outcome.results, len(outcome.courses)
        cells = [_percent(results.score(STUDENT, domain)) for domain in results.domains]
        cells += [_percent(results.mean_score(STUDENT)), _percent(results.recovery(), bounds=True)]
        cells += [str(outcome.recovered_at(share) or ABSENT) for share in RECOVERED]
        cells += [f"{outcome.seconds:.0f}", f"{outcome.entropy:.3f}"]
        whole = seeds == len(results.seeds)
        lines.append(_row(outcome.name + ("" if whole else f" ({seeds} of {len(results.seeds)} seeds)"), cells))
    return "\n".join(lines)


def _row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _percent(value: Interval | None, bounds: bool = False) -> str:
    if value is None:
        return ABSENT
    return f"{100 * value.mean:.1f}" + (f" [{100 * value.low:.0f}, {100 * value.high:.0f}]" if bounds else "")


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of the table's figures by variant, and the learning curve of each seed."""
    variants = {}
    for outcome in outcomes:
        results = outcome.results
        scores = {domain: results.score(STUDENT, domain) for domain in results.domains}
        recovery = results.recovery()
        variants[outcome.name] = {
            "seeds": sorted(outcome.courses),
            "scores": {domain: None if found is None else vars(found) for domain, found in scores.items()},
            "mean": None if (mean := results.mean_score(STUDENT)) is None else vars(mean),
            "recovery": None if recovery is None else vars(recovery),
            "steps_to_recover": {f"{share:.0%}": outcome.recovered_at(share) for share in RECOVERED},
            "seconds": outcome.seconds,
            "seconds_a_step": outcome.step_seconds,
            "entropy": outcome.entropy,
            "curves": {seed: course.curve for seed, course in outcome.courses.items()},
            "monitored_teachers": outcome.teachers,
        }
    return variants


def ratios(outcomes: Sequence[Outcome]) -> str:
    """Seconds a step of each variant against the first."""
    first = outcomes[0]
    others = [f"{o.name} {o.step_seconds / first.step_seconds:.2f}x" for o in outcomes[1:]]
    return (
        f"seconds a step against {first.name} ({first.step_seconds:.3f} s): {', '.join(others) or 'no other variant'}"
    )


def _course(store: Store, student: Node, domains: Sequence[str]) -> Course:
    """A student's journal, as far as the table needs it.

    Raises:
        UserError: the student was trained without a monitor.
    """
    path = store.work(student.key) / JOURNAL_FILE
    records = [record for record in read(path) if record["kind"] == "metrics"] if path.exists() else []
    curve, seconds, entropy = {}, [], []
    for record in records:
        values = record["values"]
        scores = [values.get(f"distill/score/{domain}") for domain in domains]
        if None not in scores:
            curve[record["step"]] = statistics.fmean(scores)
        if record["step"]:
            seconds.append(sum(v for key, v in values.items() if key.startswith("distill/seconds/")))
            found = [values.get(f"distill/entropy/{domain}") for domain in domains]
            entropy += [statistics.fmean(found)] if None not in found else []
    if 0 not in curve:
        raise UserError(f"{store.home}: {student.id} ({student.key}) was made without a monitor; take another --home")
    return Course(curve, seconds, entropy)


def _monitored_teachers(graph: StageGraph, results: Results, seed: int) -> float:
    """The teachers' mean score, each on its own domain, on the examples the student is monitored on."""
    config = graph.config
    assert config.merge is not None and config.merge.monitor is not None
    means = []
    for name in results.expert_domains:
        domain = load_domain(name, config.domains[name].kind, config.domains[name].options)
        drawn = {example.id for example in domain.draw(HELD_OUT, config.merge.monitor.examples, EXAMPLES_SEED)}
        sheet = results.cells[(results.teacher(name) or "", name, HELD_OUT)][seed]
        scored = [score for score, known in zip(sheet.greedy_N, sheet.ids, strict=True) if known in drawn]
        if len(scored) < len(drawn):
            raise UserError(f"domains.{name}: --examples must be among the evaluate.examples of each domain")
        means.append(float(np.mean(scored)))
    return statistics.fmean(means)
