"""Suggests what to do next, from the numbers of a run. Rules are data; the first that fits a domain is used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evals.comparison.forgetting import drop
from evals.comparison.results import BASELINES, STUDENT, Results
from evals.promotion.criterion import Kind
from evals.promotion.gate import GateVerdict
from evals.statistics.interval import Interval
from evals.statistics.power import examples_needed
from experts.domain import HELD_OUT

MOST = 3
# Below the first, a policy is rewarded too seldom to learn from it.
NO_REWARD, CEILING = 0.02, 0.95
# The share of its first entropy below which a student has settled on few answers.
COLLAPSED = 0.3
CUT_OFF = 0.1
LAG = 0.02
OPEN_TEACHER = 0.9


@dataclass(frozen=True)
class Settings:
    """The settings of a run that the rules use.

    Attributes:
        command: The command line that makes the run.
        margin: Allowed deficit to each teacher.
        max_forgetting: Allowed mean drop on domains no expert trains.
        examples: Examples of each domain.
        confidence: Level of all intervals.
        max_new_tokens: Longest completion of an evaluation.
        steps: Checkpoint -> the key of its `max_steps` and its value.
        entropy: (checkpoint, domain) -> mean token entropy at the beginning and at the end of its training, in nats.
        from_champion: Whether the merge starts from the champion.
    """

    command: str = "mopd run"
    margin: float = 0.08
    max_forgetting: float = 0.05
    examples: int = 0
    confidence: float = 0.95
    max_new_tokens: int = 0
    steps: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    entropy: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    from_champion: bool = False


@dataclass(frozen=True)
class Case:
    """One domain with a teacher that is not the start.

    Attributes:
        domain: Its name.
        teacher: Node name of its teacher.
        candidate: Node name of the merge that is judged.
        start: Score of the start, a share.
        taught: Score of the teacher, a share.
        own: Score of the candidate, a share; None where it is not scored, as is `gap`.
        gain: The teacher's score less the start's.
        gap: The candidate's score less the teacher's.
        spread: Standard deviation of a unit's difference between candidate and teacher (`evals.statistics.units`).
        examples: Number of examples scored.
        units: Number of independent examples that they are worth, given their units; 0 where the candidate is not
            scored.
        truncated: Share of the candidate's completions that are truncated.
        method: How the teacher was trained (`given`: elsewhere); empty where it is no expert.
        settings: The run's settings.
    """

    domain: str
    teacher: str
    candidate: str
    start: float
    taught: float
    own: float | None
    gain: Interval
    gap: Interval | None
    spread: float
    examples: int
    units: int
    truncated: float
    method: str
    settings: Settings

    @property
    def trained(self) -> bool:
        """Whether this run trains the teacher, so that its settings can be changed."""
        return self.method not in ("", "given")

    @property
    def lags(self) -> bool:
        """Whether the candidate is shown below its teacher, by a relevant amount."""
        return self.gap is not None and self.gap.high < 0 and self.gap.mean < -LAG

    @property
    def entropies(self) -> tuple[float, float]:
        """Entropies at the beginning and end of the candidate's training here; zeros where they are not recorded."""
        return self.settings.entropy.get((self.candidate, self.domain), (0.0, 0.0))

    @property
    def imprecise(self) -> bool:
        """Whether the candidate is not shown within the margin, and more examples could show it."""
        return self.gap is not None and self.gap.low <= -self.settings.margin and self.enough > 0

    @property
    def enough(self) -> int:
        """Units that show the candidate within the margin with a power of 80 %, at the gap and spread measured."""
        room = self.settings.margin + (self.gap.mean if self.gap else 0.0)
        return examples_needed(room, self.settings.confidence, sd=self.spread) if room > 0 else 0

    @property
    def remedy(self) -> str:
        """A suggestion that brings the candidate nearer to its teacher."""
        if self.candidate.startswith(BASELINES):
            return f"its settings are in merge.{self.candidate.replace('/', '.')}"
        return f"merge longer, {self.longer(STUDENT)}, or give it more prompts, merge.domain_weights.{self.domain}=2"

    def longer(self, checkpoint: str) -> str:
        """The override that doubles a checkpoint's steps."""
        key, steps = self.settings.steps.get(checkpoint, ("", 0))
        return f"{key}={2 * steps}" if key else "more steps"


@dataclass(frozen=True)
class Rule:
    """The condition of a suggestion, its wording, and the kind of criterion that it helps to meet."""

    name: str
    fits: Callable[[Case], bool]
    wording: Callable[[Case], str]
    helps: Kind


RULES = (
    Rule(
        "no reward",
        lambda case: case.method in ("rl", "rft") and case.start < NO_REWARD and case.taught < NO_REWARD,
        lambda case: (
            f"{case.teacher} found no reward on {case.domain} ({100 * case.start:.1f} → {100 * case.taught:.1f} %): "
            "add demonstrations to the cold start, choose an easier task, or train it by sft"
        ),
        "gain",
    ),
    Rule(
        "teacher not above the start",
        lambda case: case.trained and case.gain.low <= 0 and case.start < CEILING,
        lambda case: (
            f"{case.teacher} itself is barely above the start on {case.domain} ({100 * case.start:.1f} → "
            f"{100 * case.taught:.1f} %): train it longer, {case.longer(case.teacher)}"
        ),
        "gain",
    ),
    Rule(
        "cut off",
        lambda case: case.truncated > CUT_OFF and (case.own or 0.0) < CEILING,
        lambda case: (
            f"{100 * case.truncated:.0f} % of {case.candidate}'s answers on {case.domain} are cut off at "
            f"{case.settings.max_new_tokens} tokens: raise evaluate.max_new_tokens and merge.max_new_tokens"
        ),
        "teacher",
    ),
    Rule(
        "never right at the start",
        lambda case: case.lags and case.start < NO_REWARD and not case.candidate.startswith(BASELINES),
        lambda case: (
            f"the start has {100 * case.start:.1f} % on {case.domain}, so nearly all of the student's "
            f"own completions are wrong and teach it little: merge.on_policy_fraction=0.5 "
            f"merge.objective=forward_kl merge.domain_weights.{case.domain}=6; or demonstrations in the cold start"
        ),
        "teacher",
    ),
    Rule(
        "entropy collapse",
        lambda case: case.lags and case.entropies[1] < COLLAPSED * case.entropies[0],
        lambda case: (
            f"the student's entropy on {case.domain} fell from {case.entropies[0]:.2f} to {case.entropies[1]:.2f} nats "
            f"while it is {-100 * _gap(case):.1f} points below {case.teacher}: lower merge.optimizer.learning_rate"
        ),
        "teacher",
    ),
    Rule(
        "behind its teacher",
        lambda case: case.lags,
        lambda case: (
            f"{case.candidate} is {-100 * _gap(case):.1f} points below {case.teacher} on {case.domain}: {case.remedy}"
        ),
        "teacher",
    ),
    Rule(
        "too few units",
        lambda case: case.imprecise and case.units < case.examples,
        lambda case: (
            f"the {case.examples} examples of {case.domain} are worth {case.units} alone, too few to show it "
            f"within {100 * case.settings.margin:.0f} points; about {case.enough} would suffice with a power of "
            "80 %: add data, or raise held_out_share"
        ),
        "teacher",
    ),
    Rule(
        "too few examples",
        lambda case: case.imprecise,
        lambda case: (
            f"{case.examples} examples are too few to show {case.domain} within "
            f"{100 * case.settings.margin:.0f} points: evaluate.examples={case.enough} would suffice with a power of "
            "80 %"
        ),
        "teacher",
    ),
)


def advice(results: Results, verdict: GateVerdict | None, settings: Settings) -> tuple[str, ...]:
    """At most three suggestions, the most urgent first; none if nothing is measured.

    Args:
        results: The run's scores.
        verdict: The gate's verdict; None without a merge.
        settings: The run's settings.
    """
    if verdict is not None and verdict.unfinished:
        return (f"`{settings.command}` makes the missing parts",)
    candidate = verdict.candidate if verdict else ""
    cases = [case for domain in results.domains if (case := _case(results, domain, candidate, settings))]
    failed = {one.kind for one in verdict.criteria if one.passed is False} if verdict else set()
    helpful = _by_domain(cases)
    if verdict is not None and "forgetting" in failed:
        helpful.append((_anchor(results, verdict.candidate), "forgetting"))
    if "champion" in failed and not settings.from_champion:
        helpful.append(("merge.start_from=champion starts from the champion's weights", "champion"))
    # A suggestion that helps to meet a failed criterion comes before any other.
    found = [text for text, kind in sorted(helpful, key=lambda each: each[1] not in failed)]
    if verdict is not None and verdict.passed:
        found += _better_teacher(cases)
    if len(results.seeds) == 1 and cases:
        found.append(f"`{settings.command} seeds=[0,1,2]` shows how much the results differ by seed")
    return tuple(found[:MOST])


def _case(results: Results, domain: str, candidate: str, settings: Settings) -> Case | None:
    own = next((name for name, expert in results.experts.items() if expert.domain == domain), None)
    teacher = results.teacher(domain) or own
    start = results.score(results.start, domain)
    taught = results.score(teacher, domain) if teacher and teacher != results.start else None
    if teacher is None or start is None or taught is None:
        return None
    gain, gap = results.difference(teacher, results.start, domain), results.difference(candidate, teacher, domain)
    score, pair = results.score(candidate, domain), results.aligned([candidate, teacher], domain)
    spread = float(np.std((pair[0] - pair[1]).mean(axis=0), ddof=1)) if pair and pair[0].shape[1] > 1 else 0.0
    sheets = results.cells.get((candidate, domain, HELD_OUT), {}).values()
    cut = float(np.mean([row["greedy"]["truncated"] for sheet in sheets for row in sheet.rows])) if sheets else 0.0
    expert = results.experts.get(teacher)
    assert gain is not None
    return Case(
        domain=domain,
        teacher=teacher,
        candidate=candidate,
        start=start.mean,
        taught=taught.mean,
        own=score.mean if score else None,
        gain=gain,
        gap=gap,
        spread=spread,
        examples=results.examples(domain),
        units=pair[0].shape[1] if pair else 0,
        truncated=cut,
        method=expert.method if expert else "",
        settings=settings,
    )


def _by_domain(cases: Sequence[Case]) -> list[tuple[str, Kind]]:
    """A sentence for each rule that fits a domain, with the kind it helps: on the worst domain, the others by name."""
    fitting: dict[str, list[Case]] = {}
    for case in cases:
        if rule := next((rule for rule in RULES if rule.fits(case)), None):
            fitting.setdefault(rule.name, []).append(case)
    suggestions: list[tuple[str, Kind]] = []
    for rule in RULES:
        if found := sorted(fitting.get(rule.name, ()), key=lambda case: (_gap(case), case.taught)):
            others = ", ".join(case.domain for case in found[1:4]) + (", …" if len(found) > 4 else "")
            suggestions.append((rule.wording(found[0]) + (f" (also {others})" if others else ""), rule.helps))
    return suggestions


def _anchor(results: Results, candidate: str) -> str:
    """A suggestion that preserves the domain that was forgotten most."""
    drops = {domain: lost.mean for domain in results.untrained if (lost := drop(results, candidate, domain))}
    worst = max(drops, key=lambda domain: drops[domain])
    loss = f"{worst} fell by {100 * drops[worst]:.1f} points"
    if worst in results.anchored:
        return f"{loss} although it is anchored: merge.anchor.weight=2"
    return f"{loss} and is not trained on: merge.anchor.domains=[{', '.join([*results.anchored, worst])}]"


def _better_teacher(cases: Sequence[Case]) -> list[str]:
    """For a student as good as its teachers: a suggestion for the teacher that limits it most."""
    weakest = min((case for case in cases if case.trained), key=lambda case: case.taught, default=None)
    if weakest is None or weakest.taught >= OPEN_TEACHER:
        return []
    return [
        f"a better teacher is worth most on {weakest.domain}, where {weakest.teacher} itself has "
        f"{100 * weakest.taught:.1f} %: {weakest.longer(weakest.teacher)}"
    ]


def _gap(case: Case) -> float:
    return case.gap.mean if case.gap else 0.0
