"""Simulates how often the intervals cover the true value and how often the tests are wrong.

    python -m studies.calibration [--trials 2000] [--json FILE]

prints a line for each case with its bounds, and exits with 1 if any case is outside. `docs/evidence.md` has its table.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from evals.claims.verdicts import Finding, judged
from evals.comparison.merges import best, lead, merges
from evals.comparison.metrics import Triple, recovery
from evals.comparison.results import BASELINES, MIN_SEEDS, STUDENT, Expert, Results
from evals.comparison.scores import Scores
from evals.config.claims import ComparisonConfig, Expectation, FitConfig
from evals.promotion.gate import judge
from evals.statistics.crossed_effects import over_both, over_examples
from evals.statistics.interval import Interval
from evals.statistics.intervals import mean_over, mean_over_domains
from evals.statistics.tests_of_scores import non_inferiority
from evals.statistics.units import by_unit
from experts.domain import HELD_OUT

# A 95 % interval must cover at least 92 %. There is no upper bound: near 0 and 1 any interval may cover all.
COVERED = (0.92, 1.0)
LEVEL = 0.025
# A nominal level of 2.5 % may be 4 %.
WRONG = (0.0, 0.04)
MARGIN = 0.08


@dataclass(frozen=True)
class Case:
    """One simulated figure.

    Attributes:
        what: The quantity.
        setting: Its parameters.
        value: The share of trials.
        low: The least share that is right.
        high: The largest share that is right.
        trials: Number of trials.
    """

    what: str
    setting: str
    value: float
    low: float
    high: float
    trials: int

    @property
    def holds(self) -> bool:
        """Whether the value is inside its bounds, allowing three standard errors of the simulation."""
        error = 3 * (max(self.value * (1 - self.value), 1 / self.trials) / self.trials) ** 0.5
        return self.low - error <= self.value <= self.high + error


def covered(
    draw: Callable[[], Mapping[str, np.ndarray]], truth: float, interval_of: Callable[..., Interval], trials: int
) -> float:
    """The share of trials in which the interval covers the true value."""
    found = [interval_of(draw()) for _ in range(trials)]
    return float(np.mean([each.low <= truth + 1e-12 and truth - 1e-12 <= each.high for each in found]))


def scores(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """Intervals of a score: one seed or three that share half of their answers, one domain or many."""
    for domains, seeds in ((1, 1), (1, 3), (4, 1), (100, 1)):
        for examples in (20, 50, 100, 400, 1000) if domains < 100 else (20,):
            for share in (0.5, 0.8, 0.95, 0.99, 1.0):

                def draw(
                    shape: tuple[int, int, float, int] = (seeds, examples, share, domains),
                ) -> dict[str, np.ndarray]:
                    rows, columns, right, count = shape
                    answers = {}
                    for number in range(count):
                        same_1N, own_SN = rng.random((1, columns)) < right, rng.random((rows, columns)) < right
                        answers[str(number)] = np.where(rng.random((rows, columns)) < 0.5, same_1N, own_SN).astype(
                            float
                        )
                    return answers

                few = trials if domains == 1 else trials // 4
                setting = f"p={share:g} n={examples} seeds={seeds} domains={domains}"
                yield Case("score covered", setting, covered(draw, share, mean_over_domains, few), *COVERED, few)


def differences(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """Intervals of a paired difference: examples won and lost."""
    for domains in (1, 4, 20, 100):
        for examples in (20, 100, 400, 1000) if domains < 20 else (20, 100):
            for won, lost in ((0.0, 0.02), (0.02, 0.05), (0.0, 0.08), (0.2, 0.2), (0.3, 0.1)):

                def draw(
                    shape: tuple[int, int, float, float] = (domains, examples, won, lost),
                ) -> dict[str, np.ndarray]:
                    count, columns, up, down = shape
                    drawn = rng.random((count, columns))
                    return {str(n): (u < up).astype(float) - ((u >= up) & (u < up + down)) for n, u in enumerate(drawn)}

                few = trials if domains < 20 else trials // 4
                setting = f"won={won:g} lost={lost:g} n={examples} domains={domains}"
                yield Case("difference covered", setting, covered(draw, won - lost, mean_over, few), *COVERED, few)


def recoveries(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """The interval of recovery where the teacher's gain over a start at 40 % is shown; two answers of three agree."""
    start, few = 0.4, trials // 2
    for examples in (20, 50, 100, 400):
        for teacher, student in ((1.0, 0.98), (0.99, 0.99), (0.9, 0.8), (0.8, 0.85)):
            truth = (student - start) / (teacher - start)
            found = []
            for _ in range(few):
                luck_N = rng.random(examples)
                own_N = np.where(rng.random(examples) < 2 / 3, luck_N, rng.random(examples))
                right = rng.random(examples) < start, luck_N < teacher, own_N < student
                interval = recovery({"a": Triple(*(row_N[None].astype(float) for row_N in right))})
                found += [interval.low <= truth <= interval.high] if interval else []
            setting = f"teacher={teacher:g} student={student:g} n={examples}"
            yield Case("recovery covered", setting, float(np.mean(found)), *COVERED, len(found))


def levels(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """How often a student at the margin below its teacher passes, and how often one that is 3 points below.

    The power may be 3 points lower than that of the t-test without added examples, on the same draws.
    """

    def passes(examples: int, won: float, lost: float) -> tuple[float, float]:
        drawn = rng.random((trials, examples))
        rows = (drawn < won).astype(float) - ((drawn >= won) & (drawn < won + lost))
        zeros = np.zeros(examples)
        plain = stats.ttest_1samp(rows, -MARGIN, axis=1, alternative="greater").pvalue < LEVEL
        return float(np.mean([non_inferiority(row, zeros, MARGIN) < LEVEL for row in rows])), float(np.mean(plain))

    for examples in (2, 5, 10, 20, 50, 100, 200, 400, 1000):
        for won in (0.0, 0.05):
            value, _ = passes(examples, won, won + MARGIN)
            yield Case("passes at the margin", f"n={examples} won={won:g}", value, *WRONG, trials)
    for won in (0.0, 0.02, 0.05, 0.1):
        value, plain = passes(400, won, won + 0.03)
        yield Case(
            "passes 3 points below", f"n=400 won={won:g}, t-test {100 * plain:.1f}", value, plain - 0.03, 1.0, trials
        )


def unit_levels(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """How often a student at the margin passes where examples are of unequal units, whose answers agree or not."""
    for examples, units, few in ((400, 30, trials), (400, 350, trials // 4)):
        places_N = np.sort(np.minimum(rng.geometric(2 / units, examples), units) - 1)
        names = [str(place) for place in places_N]
        for agreement in (0.0, 0.5, 1.0):
            passed = 0
            for _ in range(few):
                luck_N = np.where(rng.random(examples) < agreement, rng.random(units)[places_N], rng.random(examples))
                lost_N = (luck_N < MARGIN).astype(float)
                values_G = by_unit(-lost_N, names)
                passed += non_inferiority(values_G, np.zeros(len(values_G)), MARGIN) < LEVEL
            setting = f"n={examples} of {len(set(names))} units, agree={agreement:g}"
            yield Case("passes at the margin, by unit", setting, passed / few, *WRONG, few)


def runs(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """Whole runs with several merges: the winner's interval, and the gate's choice among them."""
    for rivals in (1, 4, 9):
        few = max(100, trials // 10)
        outs = passed = 0
        for _ in range(few):
            equal = _run(rng, rivals, 0.8, teacher=0.8)
            found = merges(equal)
            first = best(found)
            ahead = lead(equal, found, first) if first is not None and first.name != STUDENT else None
            outs += ahead is not None and ahead.shows_difference
            at_margin = _run(rng, rivals, 1 - MARGIN, teacher=1.0)
            passed += judge(at_margin, MARGIN, 1.0).promoted
        yield Case("best of equal merges shown ahead", f"rivals={rivals}", outs / few, 0.0, 0.05, few)
        yield Case("promoted at the margin", f"rivals={rivals}", passed / few, *WRONG, few)


def _run(rng: np.random.Generator, rivals: int, share: float, teacher: float, examples: int = 100) -> Results:
    """A run of one domain in which all merges have the same true score and nothing is forgotten."""

    def sheet(right: float) -> dict[int, Scores]:
        greedy_N = rng.random(examples) < right
        rows = [
            {"id": str(n), "source": str(n), "prompt": str(n), "answer": "", "contaminated": False, "samples": []}
            | {"greedy": {"completion": "", "score": float(good), "tokens": 1, "truncated": False}}
            for n, good in enumerate(greedy_N)
        ]
        return {0: Scores("a", HELD_OUT, rows)}

    alike = [STUDENT, *(f"{BASELINES}{n}" for n in range(rivals))]
    cells = {(name, "a", HELD_OUT): sheet(share) for name in alike}
    cells |= {("cold_start", "a", HELD_OUT): sheet(0.2), ("experts/a", "a", HELD_OUT): sheet(teacher)}
    names = ("cold_start", "experts/a", *alike)
    taught = {"a": {"experts/a": 1.0}}
    experts = {"experts/a": Expert("a", "rl")}
    return Results("simulated", (0,), names, ("a",), cells, taught, experts, (), "cold_start", 0.95, {})


def fits(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """How often a parabola is shown to explain anything where x and y are unrelated; methods scatter, or not."""
    for methods, each, scatter in ((5, 1, 0.0), (7, 1, 0.0), (9, 1, 0.0), (20, 1, 0.0), (5, 3, 3.0), (9, 3, 3.0)):
        groups = [[f"{method}/{number}" for number in range(each)] for method in range(methods)]
        asked = FitConfig(x_domains=["a"], checkpoints=list(groups))
        test = ComparisonConfig(fit=asked, measure="drop", expect="above", margin=0.0)
        shown = 0
        for _ in range(trials):
            centres = scatter * rng.normal(size=(methods, 2))
            own = {name: centres[m] + rng.normal(size=2) for m, group in enumerate(groups) for name in group}
            points = {name: (float(x), float(y)) for name, (x, y) in own.items()}
            (found,) = judged([Finding("H", "fit", test, points=points)], 0.95)
            shown += found.verdict == "shown"
        setting = f"methods={methods} of {each} checkpoints"
        yield Case("fit shown, no relation", setting, shown / trials, *WRONG, trials)


def pages(rng: np.random.Generator, trials: int) -> Iterator[Case]:
    """How often a page of thirty tests shows, or contradicts, anything where each is at its limit.

    Ten differences are 0, ten are a margin below, ten are a margin apart. Half of an example's answer depends on the
    seed, and with three seeds and more the seeds themselves scatter by 2 points.
    """
    kinds: tuple[tuple[Expectation, float], ...] = (("above", 0.0), ("not_below", -MARGIN), ("within", MARGIN))
    for seeds, examples in ((1, 100), (2, 100), (3, 100), (5, 400)):
        few = max(100, trials // 4)
        shown = contradicted = 0
        for _ in range(few):
            tests = []
            for number in range(30):
                expect, truth = kinds[number % 3]
                test = ComparisonConfig(compare=("a", "b"), expect=expect, margin=abs(truth))
                moved_S1 = truth + (0.02 * rng.normal(size=(seeds, 1)) if seeds >= MIN_SEEDS else 0.0)
                luck_SN = np.where(
                    rng.random((seeds, examples)) < 0.5, rng.random(examples), rng.random((seeds, examples))
                )
                table_SN = (luck_SN < 0.2 + moved_S1 / 2).astype(float) - (luck_SN > 0.8 + moved_S1 / 2)
                estimate = (over_both if seeds >= MIN_SEEDS else over_examples)({"": table_SN}, 1.0)
                tests.append(
                    Finding("H", str(number), test, estimate=estimate, seeds=seeds, values={"a": 0.0, "b": 0.0})
                )
            verdicts = {found.verdict for found in judged(tests, 0.95)}
            shown, contradicted = shown + ("shown" in verdicts), contradicted + ("contradicted" in verdicts)
        setting = f"30 tests, seeds={seeds} n={examples}"
        yield Case("page shows what is not", setting, shown / few, *WRONG, few)
        yield Case("page contradicts what is not", setting, contradicted / few, *WRONG, few)


SECTIONS = (scores, differences, recoveries, levels, unit_levels, runs, fits, pages)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every case; 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="Trials of a quick case; others have fewer.")
    parser.add_argument("--json", type=Path, help="Write the cases to this file.")
    asked = parser.parse_args(arguments)
    cases: list[Case] = []
    for section in SECTIONS:
        for case in section(np.random.default_rng(0), asked.trials):
            mark = "" if case.holds else f"  OUTSIDE [{case.low:g}, {case.high:g}]"
            sys.stdout.write(f"{case.what:33} {case.setting:38} {100 * case.value:6.1f} %{mark}\n")
            sys.stdout.flush()
            cases.append(case)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(case) for case in cases], indent=1) + "\n")
    outside = [case for case in cases if not case.holds]
    sys.stdout.write(f"{len(cases)} cases, {len(outside)} outside their bounds\n")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
