"""The first screen of a run: scores, the weakest domain, why it was (not) promoted, and what to do next.

Everything else is in the tables that follow (`evals.report.table`).
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.comparison.results import Results
from evals.promotion.advice import Settings, advice
from evals.promotion.gate import GateVerdict
from evals.statistics.interval import Interval
from evals.tables.grid import ABSENT

if TYPE_CHECKING:
    from rich.text import Text

# With more domains than this only the worst are shown.
SHOWN = 8
# At most this number of failed criteria is shown, so that the suggestions below remain visible.
FAILURES = 4
NAME_CHARACTERS = 30
WIDTH = 80
MEAN = "mean"
CAPTION = "greedy score, %, held out; gap: student less teacher (or start), points"


@dataclass(frozen=True)
class Line:
    """One domain, or the mean over the experts' domains. Scores and differences are shares.

    Attributes:
        domain: Its name, or `mean`.
        start: Score of the checkpoint that gains are measured from.
        teacher: Score of its teacher; None where it has none.
        student: Score of the candidate.
        gap: The candidate's score less the teacher's, or less the start's where there is no teacher, with its interval;
            without a merge the expert's score less the start's.
    """

    domain: str
    start: float | None
    teacher: float | None
    student: float | None
    gap: Interval | None


@dataclass(frozen=True)
class Summary:
    """The first screen of a run, as texts and numbers.

    Attributes:
        sentence: The verdict and the candidate's score.
        lines: A line for each domain, in the run file's order.
        mean: The mean over the experts' domains.
        weakest: The domain with the lowest gap; empty where nothing was compared.
        weakest_text: Its distance from its teacher.
        failed: A line for each criterion of the gate that is not met; those of domains last, the worst of them first.
        met: Numbers of criteria that failed, are met, or had nothing to compare with.
        next: Suggestions of what to do next.
    """

    sentence: str
    lines: tuple[Line, ...]
    mean: Line
    weakest: str
    weakest_text: str
    failed: tuple[str, ...]
    met: str
    next: tuple[str, ...]

    @property
    def shown(self) -> tuple[Line, ...]:
        """All lines, or only those with the lowest gaps if there are many."""
        if len(self.lines) <= SHOWN:
            return self.lines
        return tuple(sorted(self.lines, key=_rank)[:SHOWN])

    @property
    def failures(self) -> tuple[str, ...]:
        """The first lines of `failed`, and the number of the others."""
        if len(self.failed) <= FAILURES:
            return self.failed
        return (*self.failed[: FAILURES - 1], f"{len(self.failed) - FAILURES + 1} criteria more")

    @property
    def more(self) -> str:
        """A text about the domains that are not shown; empty where all are."""
        if not (rest := [line for line in self.lines if line not in self.shown]):
            return ""
        gaps = [100 * line.gap.mean for line in rest if line.gap]
        return f"and {len(rest)} more" + (f", gaps from {min(gaps):+.1f} to {max(gaps):+.1f}" if gaps else "")


def summarise(results: Results, verdict: GateVerdict | None, settings: Settings) -> Summary:
    """The first screen of a run.

    Args:
        results: Its scores.
        verdict: The gate's verdict; None without a merge.
        settings: The run's settings.
    """
    candidate = verdict.candidate if verdict else ""
    lines = tuple(_line(results, domain, candidate) for domain in results.domains)
    mean = _mean(results, candidate)
    compared = [line for line in lines if line.gap is not None]
    weakest = min(compared, key=_rank, default=None)
    ranks = {line.domain: _rank(line) for line in lines}
    failed = [one for one in verdict.criteria if one.passed is False] if verdict else []
    failed.sort(key=lambda one: ranks.get(one.domain, (-2.0, -2.0)))
    without = "The gate was not run" if results.teachers else "No merge in this run"
    return Summary(
        sentence=f"{verdict.status if verdict else without}: {_goodness(results, candidate, mean)}.",
        lines=lines,
        mean=mean,
        weakest=weakest.domain if weakest else "",
        weakest_text=_weakness(results, weakest) if weakest else "",
        failed=tuple(one.brief or f"{one.name}: {one.text}" for one in failed),
        met=_met(verdict) if verdict else "",
        next=advice(results, verdict, settings),
    )


def _met(verdict: GateVerdict) -> str:
    answers = [one.passed for one in verdict.criteria]
    counts = [(answers.count(False), "failed"), (answers.count(True), "met"), (answers.count(None), "not compared")]
    return ", ".join([f"{len(answers)} criteria", *(f"{count} {word}" for count, word in counts if count)])


def _rank(line: Line) -> tuple[float, float]:
    """The sort key: the lowest gap first, at equal gaps the lowest score; lines without a gap last."""
    score = line.student if line.student is not None else line.teacher
    return (line.gap.mean if line.gap else 2.0, score if score is not None else 2.0)


def _line(results: Results, domain: str, candidate: str) -> Line:
    expert = next((name for name, expert in results.experts.items() if expert.domain == domain), None)
    teacher = results.teacher(domain) or (None if candidate else expert)
    scores = [results.score(name, domain) if name else None for name in (results.start, teacher, candidate)]
    pair = (candidate, teacher or results.start) if candidate else (teacher, results.start)
    gap = results.difference(pair[0] or "", pair[1] or "", domain)
    start, taught, own = (score.mean if score else None for score in scores)
    return Line(domain, start, taught, own, gap)


def _mean(results: Results, candidate: str) -> Line:
    scores = [results.mean_score(name) if name else None for name in (results.start, "teacher", candidate)]
    pair = (candidate, "teacher") if candidate else ("teacher", results.start)
    gap = results.mean_difference(*pair, results.expert_domains)
    start, taught, own = (score.mean if score else None for score in scores)
    return Line(MEAN, start, taught, own, gap)


def _goodness(results: Results, candidate: str, mean: Line) -> str:
    domains = results.expert_domains
    many = f"the mean of the experts' {len(domains)} domains" if len(domains) > 1 else "the expert's domain"
    who, value = (candidate, mean.student) if candidate else ("the experts", mean.teacher)
    if value is None:
        return f"{who} is not scored on {many} yet" if candidate else f"not all scored on {many} yet"
    start = f", from {100 * mean.start:.1f} % at the start" if mean.start is not None else ""
    teachers = f", with teachers at {100 * mean.teacher:.1f} %" if candidate and mean.teacher is not None else ""
    return f"{who} has {100 * value:.1f} % on {many}{start}{teachers}"


def _weakness(results: Results, line: Line) -> str:
    if line.gap is None or line.student is None:
        return f"{line.domain}, {points(line.gap)} points to the start" if line.gap else ""
    other, name = (line.teacher, "its teacher's") if line.teacher is not None else (line.start, "the start's")
    return f"{line.domain}, {100 * line.student:.1f} % against {name} {100 * (other or 0):.1f} %"


def table(summary: Summary) -> list[str]:
    """The domains as text of at most twelve lines and 80 columns."""
    shown = [*summary.shown, summary.mean]
    width = min(NAME_CHARACTERS, max(len(line.domain) for line in [*shown, summary.mean]))
    width = max(width, len("domain"), len(summary.more) if len(summary.more) <= NAME_CHARACTERS else 0)
    rows = [CAPTION, f"{'domain':<{width}}  {'start':>6}  {'teacher':>7}  {'student':>7}  {'gap':>12}"]
    for line in summary.shown:
        rows.append(_text(line, width) + ("  weakest" if line.domain == summary.weakest else ""))
    if summary.more:
        rows.append(summary.more)
    return [*rows, _text(summary.mean, width)]


def _text(line: Line, width: int) -> str:
    name = line.domain if len(line.domain) <= width else line.domain[: width - 1] + "…"
    cells = (percent(line.start), percent(line.teacher), percent(line.student))
    return f"{name:<{width}}  {cells[0]:>6}  {cells[1]:>7}  {cells[2]:>7}  {points(line.gap):>12}"


def render(summary: Summary, width: int = WIDTH) -> list["Text"]:
    """The first screen as styled lines; words are never broken."""
    from rich.text import Text

    found = [Text(line, style="bold") for line in _wrapped(summary.sentence, width)]
    found += [Text(), *(Text(line, no_wrap=True) for line in table(summary)), Text()]
    if summary.weakest_text:
        found += [Text(line) for line in _wrapped(f"Weakest: {summary.weakest_text}", width)]
    for failed in summary.failures:
        found += [Text(line, style="red") for line in _wrapped(f"Failed: {failed}", width, "  ")]
    if summary.met:
        found += [Text(line) for line in _wrapped(f"Gate: {summary.met}", width)]
    if summary.next:
        found += [Text("Next:"), *(Text(line) for one in summary.next for line in _wrapped(f"- {one}", width, "  "))]
    return found


def _wrapped(text: str, width: int, indent: str = "") -> Sequence[str]:
    # A number and its sign stay on one line.
    joined = text.replace(" %", "\u00a0%")
    lines = textwrap.wrap(joined, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\u00a0%", " %") for line in lines]


def percent(share: float | None) -> str:
    """A share in percent."""
    return ABSENT if share is None else f"{100 * share:.1f}"


def points(gap: Interval | None) -> str:
    """A difference in points with half the width of its interval."""
    return ABSENT if gap is None else f"{100 * gap.mean:+.1f} ±{50 * (gap.high - gap.low):.1f}"
