"""The gate: selects the candidate among a run's merges and judges by criteria whether it becomes champion.

Merges are compared as recipes, over all seeds. A single checkpoint is promoted, the first seed's, and it is judged by
its own scores against its own seed's teachers. The recipe's result over all seeds is reported for information only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.comparison.forgetting import mean_drop
from evals.comparison.results import STUDENT, Results
from evals.comparison.scores import Scores
from evals.promotion.candidates import Rival, rivals
from evals.promotion.champions import best_of_line, itself, previous
from evals.promotion.criterion import Criterion, points
from evals.statistics.interval import Interval
from evals.statistics.intervals import differences, mean_over, paired_difference
from evals.statistics.power import fewest_examples
from evals.statistics.tests_of_scores import intersection_union, mean_superiority, non_inferiority

NOTHING = "nothing was learnt"


@dataclass(frozen=True)
class GateVerdict:
    """The run's candidate, whether it becomes champion, and the reasons.

    Attributes:
        candidate: Name of a merge: `student` (MOPD), `baselines/NAME` or `variants/NAME`.
        why: Why this merge is the candidate.
        criteria: The criteria, each with its result.
        withheld: Why it does not become champion although it passed: a person's decision takes precedence. Empty
            otherwise.
        reigns: Since when, by whom and why the candidate is the champion already. Empty where it is not.
        unfinished: What the run has not made yet, so that nothing can be judged. Empty where all is made.
    """

    candidate: str
    why: str
    criteria: tuple[Criterion, ...]
    withheld: str = ""
    reigns: str = ""
    unfinished: str = ""

    @property
    def passed(self) -> bool:
        """Whether no criterion failed and at least one was met."""
        answers = [criterion.passed for criterion in self.criteria]
        return False not in answers and True in answers

    @property
    def promoted(self) -> bool:
        """Whether the gate makes it the champion; False for the champion itself."""
        return self.passed and not (self.withheld or self.reigns or self.unfinished)

    @property
    def is_champion(self) -> bool:
        """Whether the candidate becomes the champion, or is the champion and passes the gate."""
        return self.promoted or (bool(self.reigns) and self.passed)

    @property
    def failed(self) -> list[str]:
        """Names of the criteria that failed."""
        return [criterion.name for criterion in self.criteria if criterion.passed is False]

    @property
    def nothing_learnt(self) -> bool:
        """Whether teachers or candidate are not shown above the start."""
        return any(criterion.kind == "gain" and criterion.passed is False for criterion in self.criteria)

    @property
    def status(self) -> str:
        """Whether it is promoted, and why not, in a few words."""
        if self.unfinished:
            return f"Not judged yet, {self.unfinished}"
        nothing = f"{NOTHING}, " if self.nothing_learnt else ""
        failed = f"{nothing}{len(self.failed)} of {len(self.criteria)} criteria failed"
        if self.reigns:
            return f"Already champion, since {self.reigns}" + ("" if self.passed else f" (by today's gate {failed})")
        if not self.passed:
            return f"Not promoted, {failed}"
        return f"Not promoted, {self.withheld}" if self.withheld else "Promoted to champion"

    @property
    def conclusion(self) -> str:
        """The candidate with its status."""
        return f"{self.candidate}: {self.status[0].lower()}{self.status[1:]}"


def judge(
    results: Results,
    margin: float,
    max_forgetting: float,
    champion: Mapping[str, Scores] | None = None,
    champion_name: str = "",
    former: Mapping[str, Mapping[str, Scores]] | None = None,
    tries: int = 1,
) -> GateVerdict:
    """Choose the candidate among the merges of a run and judge it; intervals are at the results' own confidence.

    Merges that are shown better than MOPD (`evals.promotion.candidates`) come first, the highest mean first, MOPD last.
    The first that passes is the candidate; if none does, the first of all is. The winner is chosen by the same scores
    that judge it, and each merge that is tried may pass falsely. So with other merges MOPD gets half of the level and
    all others share the other half, tried or not: the probability that any passes falsely is that of a single merge.

    A criterion with missing scores fails, so nothing is promoted unmeasured. Teachers that learnt nothing are easy to
    equal, so both teachers and candidate must be shown above the start, each by one test of the mean over the experts'
    domains (`evals.statistics.tests_of_scores.mean_superiority`): a test for each domain would refuse a run with one
    skill that was at its ceiling from the start. Both must pass, so neither is corrected. Non-inferiority to every
    teacher is an intersection-union test (Berger 1982): all must pass, so each is held to the full level without
    correction, and the largest p-value holds for all. The level is one tail of the intervals, (1 - confidence) / 2, so
    a domain passes exactly where the lower bound of its interval lies above the margin.

    Forgetting is judged by the estimate and not by its upper bound, following the design: a candidate forgets no more
    than allowed. `max_forgetting` limits the measured drop. Unlike the margin, it is not a bound for which the plan
    finds a number of examples; on the few domains that no expert trains the upper bound could refuse a checkpoint that
    lost nothing. The text shows the interval, and whether it extends beyond the limit.

    Args:
        results: The run's scores.
        margin: Allowed deficit to each domain's teacher (`Results.teacher`).
        max_forgetting: Allowed mean drop on domains no expert trains.
        champion: domain -> held-out sheet of the previous champion; None when there is none.
        champion_name: The merge that is this champion, which is not compared with itself; empty if none is.
        former: Champions before the present one: name -> held-out sheets. Each may be worse than the last by an
            undetected amount, so a line of champions could decline step by step.
        tries: The number of students judged on these examples, this one included. Enough tries would pass by chance, so
            later tries get less of the level (`spent`).
    """
    others = rivals(results)
    judged: dict[str, GateVerdict] = {}
    for name in (*(rival.name for rival in others if rival.shown), STUDENT):
        shared = results.at_share(_share(name, len(others)) * spent(tries))
        criteria = [*_teachers(shared, name, margin), _forgetting(results, name, max_forgetting)]
        criteria += _gains(shared, name)
        criteria.append(itself(name) if name == champion_name else previous(results, name, champion))
        criteria += [] if name == champion_name else best_of_line(results, name, former or {})
        judged[name] = GateVerdict(name, "", tuple(criteria))
        if judged[name].passed:
            break
    found = next((verdict for verdict in judged.values() if verdict.passed), next(iter(judged.values())))
    again = f"; try {tries} on these examples, at {spent(tries):.2g} of the gate's level" if tries > 1 else ""
    return GateVerdict(found.candidate, _why(judged, others) + again, found.criteria)


def spent(tries: int) -> float:
    """The share of the level for a try: 1 for the first, 1 / (2 t (t - 1)) for the t-th after it. All later tries
    together get half of the level, however many they are (alpha spending, Lan & DeMets 1983, Biometrika 70:659). The
    probability of a false promotion in any try is therefore at most one and a half times the level.
    """
    return 1.0 if tries <= 1 else 0.5 / (tries * (tries - 1))


def _share(name: str, others: int) -> float:
    """The share of the level at which a merge is judged beside this number of others."""
    if not others:
        return 1.0
    return 0.5 if name == STUDENT else 0.5 / others


def _why(judged: Mapping[str, GateVerdict], others: Sequence[Rival]) -> str:
    if not others:
        return "no other merge to compare with"
    ahead = [rival for rival in others if rival.shown]
    mean = f"better than {STUDENT} on the mean of the experts' domains"
    level = f"; half of the gate's level is {STUDENT}'s, the rest is shared by the others"
    if not ahead:
        nearest = min(others, key=lambda rival: rival.p_value)
        return f"of {len(others)} other merges none is shown {mean}; nearest {_lead(nearest)}{level}"
    failed = {name: ", ".join(verdict.failed) for name, verdict in judged.items() if not verdict.passed}
    leads = [
        _lead(rival) + (f", fails the gate ({failed[rival.name]})" if rival.name in failed else "") for rival in ahead
    ]
    return f"{len(ahead)} of {len(others)} other merges shown {mean}: {'; '.join(leads)}{level}"


def _lead(rival: Rival) -> str:
    level = f"Holm-corrected, level {rival.level:.2g}"
    return f"{rival.name} {100 * rival.gain:+.1f} points (p = {rival.p_value:.2g}, {level})"


def _gains(results: Results, candidate: str) -> list[Criterion]:
    """The criteria that teachers and candidate are above the start, on the mean of the domains that can be learnt."""
    start, domains = results.start, _learnt(results)
    if not domains:
        text = f"no domain has another teacher than {start}, so there is nothing to learn"
        return [Criterion(f"above {start}", False, text, kind="missing")]
    return [
        _gain(results, "teacher", f"teachers above {start}", "the teachers", domains),
        _gain(results, candidate, f"{candidate} above {start}", candidate, domains),
    ]


def _learnt(results: Results) -> tuple[str, ...]:
    """The experts' domains; in a run without experts those with a teacher that is not the start."""
    others = (domain for domain in results.domains if results.teacher(domain) not in (None, results.start))
    return results.expert_domains or tuple(others)


def _gain(results: Results, role: str, name: str, called: str, domains: Sequence[str]) -> Criterion:
    one, start = _promotable(results), results.start
    found = {domain: one.aligned([one.checkpoint(role, domain), start], domain) for domain in domains}
    pairs = {domain: (pair[0], pair[1]) for domain, pair in found.items() if pair and pair[0].shape[1] > 1}
    if missing := [domain for domain in domains if domain not in pairs]:
        text = f"{', '.join(missing)}: not scored with two examples or more, so no gain is shown"
        return Criterion(name, False, text, kind="missing")
    own, its = (100 * float(np.mean([pair[index].mean() for pair in pairs.values()])) for index in (0, 1))
    gain = mean_over({domain: differences(*pair) for domain, pair in pairs.items()}, results.confidence)
    p_value = mean_superiority(pairs)
    passed = p_value < (1 - results.confidence) / 2
    shown = f"above {start}" if passed else f"not shown above {start}: {NOTHING}"
    text = (
        f"mean of {', '.join(domains)}: {called} {own:.1f} % against {its:.1f} %{_seed(results)}: difference "
        f"{points(gain)}, p = {p_value:.2g}, so {shown}."
    )
    brief = f"{called} at {own:.1f} %, {start} at {its:.1f} %: {points(gain)}, {shown}"
    return Criterion(
        name, passed, text + _over_all(results, results.mean_difference(role, start, domains)), brief, "gain"
    )


def _teachers(results: Results, candidate: str, margin: float) -> list[Criterion]:
    """A criterion for each domain: the candidate is non-inferior to its teacher there."""
    if not results.teachers:
        return [Criterion("teachers", False, "no teacher to compare with", kind="missing")]
    one = _promotable(results)
    pairs = {domain: one.aligned([candidate, one.teacher(domain)], domain) for domain in one.teachers}
    # A domain without scores, or with a single example, counts as not shown.
    p_values = {
        domain: non_inferiority(pair[0], pair[1], margin) if pair and pair[0].shape[1] > 1 else 1.0
        for domain, pair in pairs.items()
    }
    worst = intersection_union(p_values)
    together = f" (all teachers must pass, so p is not corrected; largest p = {worst:.2g})" if len(pairs) > 1 else ""
    criteria = []
    for domain, pair in pairs.items():
        name = f"non-inferior to {results.teacher(domain)} on {domain}"
        if pair is None or pair[0].shape[1] < 2:
            few = "not scored" if pair is None else "a single example"
            criteria.append(Criterion(name, False, f"{domain}: {few}, so not shown non-inferior.", kind="missing"))
            continue
        passed = p_values[domain] < (1 - results.confidence) / 2
        difference = paired_difference(pair[0], pair[1], results.confidence)
        fewest = fewest_examples(margin, results.confidence)
        judged, shown = ("non-inferior", "shown") if passed else ("not shown non-inferior", "not shown")
        if not passed and pair[0].shape[1] < fewest:
            shared = pair[0].shape[1] < one.examples(domain)
            what = f"independent examples, here {pair[0].shape[1]}," if shared else "examples"
            judged = f"cannot be judged: with fewer than {fewest} {what} even equal answers do not show it"
            shown = f"cannot be judged with fewer than {fewest} {what.rstrip(',')}, so not shown"
        text = (
            f"{domain}: {100 * pair[0].mean():.1f} % against its teacher's {100 * pair[1].mean():.1f} %"
            f"{_seed(results)}: difference {points(difference)}, p = {p_values[domain]:.2g}, "
            f"the interval {'lies' if passed else 'does not lie'} above {-100 * margin:.1f}: {judged}{together}."
        )
        brief = f"{domain}: {points(difference)} to {results.teacher(domain)}, {shown} above {-100 * margin:.1f}"
        text += _over_all(results, results.difference(candidate, "teacher", domain))
        criteria.append(Criterion(name, passed, text, brief, "teacher", domain))
    return criteria


def _promotable(results: Results) -> Results:
    """The results of the seed whose checkpoint can become champion: the first."""
    return replace(results, seeds=results.seeds[:1])


def _seed(results: Results) -> str:
    return f" (seed {results.seeds[0]}, the one to be promoted)" if len(results.seeds) > 1 else ""


def _over_all(results: Results, value: Interval | None) -> str:
    """The recipe's difference over all seeds, for information."""
    return f" Over all {len(results.seeds)} seeds: {points(value)}." if value and len(results.seeds) > 1 else ""


def _forgetting(results: Results, candidate: str, allowed: float) -> Criterion:
    if not results.untrained:
        return Criterion("forgetting", None, "not measured: every domain has an expert", kind="forgetting")
    lost = mean_drop(_promotable(results), candidate)
    if lost is None:
        return Criterion("forgetting", False, "not scored", kind="missing")
    passed = lost.mean <= allowed
    unsure = ", beyond which the interval extends" if passed and lost.high > allowed else ""
    text = (
        f"mean drop {points(lost)} on {', '.join(results.untrained)}{_seed(results)}; the estimate may be at most "
        f"{100 * allowed:.1f}{unsure}."
    )
    brief = f"forgetting: a drop of {points(lost)}, at most {100 * allowed:.1f} is allowed"
    text += _over_all(results, mean_drop(results, candidate))
    return Criterion("forgetting", passed, text, brief, "forgetting")
