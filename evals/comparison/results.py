"""The scores of a whole run, paired by example, and its summary. Free of torch.

Shape suffixes: `S` seeds, `N` examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from base.errors import UserError
from evals.comparison.metrics import Triple, pass_at_k, recovery
from evals.comparison.scores import Scores
from evals.comparison.shifts import shift_metrics
from evals.config.claims import HypothesisConfig
from evals.statistics.crossed_effects import over_both
from evals.statistics.interval import Interval
from evals.statistics.intervals import mean_interval, mean_over, mean_over_domains, paired_difference
from evals.statistics.units import by_unit
from experts.domain import HELD_OUT

ROLES = ("base", "cold_start", "teacher", "student")
STUDENT, BASELINES, VARIANTS = "student", "baselines/", "variants/"
# With fewer seeds an interval for new seeds is too wide to be of use.
MIN_SEEDS = 3
Cell = Mapping[int, Scores]


@dataclass(frozen=True)
class Cost:
    """The cost of making a checkpoint.

    Attributes:
        tokens: Tokens the loss was computed on.
        seconds: Time from the start of its stage to the checkpoint.
        memory: Most bytes held at one time; 0 where it was not recorded.
    """

    tokens: float
    seconds: float
    memory: float


@dataclass(frozen=True)
class Expert:
    """An expert's domain and method: `sft`, `rl` or `given` (trained elsewhere)."""

    domain: str
    method: str


@dataclass(frozen=True)
class Results:
    """All score sheets of a run; sheets that do not exist yet are absent.

    Attributes:
        run: The run's name.
        seeds: All seeds of the run.
        checkpoints: Node names in order: `base`, `cold_start`, `experts/NAME`, `student`.
        domains: Domains measured, in order.
        cells: (checkpoint, domain, split) -> seed -> sheet.
        teachers: domain -> node name of a teacher of the student -> its weight.
        experts: Experts by node name.
        anchored: Domains taught by the checkpoint the student starts from.
        start: The checkpoint gains and drops are measured from.
        confidence: Level of all intervals.
        provenance: Content key and digest of each evaluation artifact, by node id.
        costs: Node name -> cost of making the checkpoint, a mean over seeds.
        spent: The cost of each seed: node name -> seed -> cost.
        hypotheses: The hypotheses that the run file fixed beforehand.
        shift: How far a checkpoint moved from the start: (node name, measure, domain, or "" for its weights) -> seed ->
            value.
        kl_examples: (node name, domain) -> seed -> values [G] by independent example; their mean is the
            shift `kl_start`.
        cosines: (expert, other expert) -> seed -> cosine of their task vectors; each pair once.
        left_out: Seeds that `of_shared_seeds` left out because some of their scores do not exist yet.
    """

    run: str
    seeds: tuple[int, ...]
    checkpoints: tuple[str, ...]
    domains: tuple[str, ...]
    cells: Mapping[tuple[str, str, str], Cell]
    teachers: Mapping[str, Mapping[str, float]]
    experts: Mapping[str, Expert]
    anchored: tuple[str, ...]
    start: str
    confidence: float
    provenance: Mapping[str, tuple[str, str]]
    costs: Mapping[str, Cost] = field(default_factory=dict)
    spent: Mapping[str, Mapping[int, Cost]] = field(default_factory=dict)
    hypotheses: Mapping[str, HypothesisConfig] = field(default_factory=dict)
    shift: Mapping[tuple[str, str, str], Mapping[int, float]] = field(default_factory=dict)
    kl_examples: Mapping[tuple[str, str], Mapping[int, np.ndarray]] = field(default_factory=dict)
    cosines: Mapping[tuple[str, str], Mapping[int, float]] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        order: dict[tuple[str, str], list[str]] = {}
        for (checkpoint, domain, split), cell in self.cells.items():
            for sheet in cell.values():
                if order.setdefault((domain, split), sheet.ids) != sheet.ids:
                    raise UserError(f"{self.run}: {checkpoint} was scored on other examples of {domain}/{split}")

    @property
    def expert_domains(self) -> tuple[str, ...]:
        """Domains that some expert trains."""
        own = {expert.domain for expert in self.experts.values()}
        return tuple(domain for domain in self.domains if domain in own)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Domains that no expert trains, on which forgetting is measured."""
        return tuple(domain for domain in self.domains if domain not in self.expert_domains)

    def examples(self, domain: str) -> int:
        """Number of held-out examples of a domain that were scored."""
        sheets = (sheet for key, cell in self.cells.items() if key[1:] == (domain, HELD_OUT) for sheet in cell.values())
        return next((len(sheet.rows) for sheet in sheets), 0)

    def teacher(self, domain: str) -> str | None:
        """The teacher that a domain's student is compared with: that of the largest weight, or the first of equals.

        It is not the best by score: that one changes with the examples drawn, and its score would be biased upwards.
        """
        weights = self.teachers.get(domain, {})
        return max(weights, key=lambda name: weights[name], default=None)

    def checkpoint(self, role: str, domain: str) -> str | None:
        """The node name of a role: `teacher` is the domain's own teacher, any other role is a node name."""
        return self.teacher(domain) if role == "teacher" else role

    def aligned(
        self,
        names: Sequence[str | None],
        domain: str,
        split: str = HELD_OUT,
        sampled: bool = False,
        seeds: Sequence[int] | None = None,
        passes: bool = False,
    ) -> list[np.ndarray] | None:
        """Scores `[S, N]` of several checkpoints over the seeds that all of them have; None if there are none.

        Examples of one unit give one value (`evals.statistics.units`), so N is the number of units, or fewer.

        Args:
            names: Node names.
            domain: The domain.
            split: Which examples.
            sampled: Take the mean over an example's sampled completions instead of the greedy completion's score.
            seeds: Restrict to these seeds; all seeds of the run by default.
            passes: Return 1 for a score above 0 and 0 otherwise, instead of the score.
        """
        cells = [self.cells.get((name or "", domain, split), {}) for name in names]
        shared = [seed for seed in seeds or self.seeds if all(seed in cell for cell in cells)]
        if not shared:
            return None
        rows = [[cell[seed].sampled_N if sampled else cell[seed].greedy_N for seed in shared] for cell in cells]
        whole = [[row_N for row_N in own if row_N is not None] for own in rows]
        if not all(len(own) == len(shared) for own in whole):
            return None
        units = cells[0][shared[0]].units
        tables = [np.stack(own) for own in whole]
        return [by_unit((table_SN > 0).astype(float) if passes else table_SN, units) for table_SN in tables]

    def of_shared_seeds(self) -> "Results":
        """The results of the seeds that all scored cells have, so that the columns of a table compare the same models.

        Unchanged where there is no such seed.
        """
        shared = tuple(seed for seed in self.seeds if all(seed in cell for cell in self.cells.values()))
        if not shared or len(shared) == len(self.seeds):
            return self
        cells = {key: {seed: cell[seed] for seed in shared} for key, cell in self.cells.items()}
        return replace(self, seeds=shared, cells=cells, left_out=tuple(set(self.seeds) - set(shared)))

    @property
    def mixes_seeds(self) -> bool:
        """Whether the cells have different seeds."""
        return len({frozenset(cell) for cell in self.cells.values()}) > 1

    def at_share(self, share: float) -> "Results":
        """The same results judged at this share of their level, which widens the intervals."""
        return replace(self, confidence=1 - (1 - self.confidence) * share)

    def score(self, role: str, domain: str, split: str = HELD_OUT) -> Interval | None:
        """Mean greedy score of a role or checkpoint on a domain."""
        found = self.aligned([self.checkpoint(role, domain)], domain, split)
        return mean_interval(found[0], self.confidence) if found else None

    def sampled(self, role: str, domain: str) -> tuple[Interval, Interval, int] | None:
        """Mean score of the sampled completions, pass@k and k, held out; None where nothing was sampled."""
        name = self.checkpoint(role, domain)
        found = self.aligned([name], domain, sampled=True)
        if found is None:
            return None
        sheets = list(self.cells[name or "", domain, HELD_OUT].values())
        drawn = [samples_NK for sheet in sheets if (samples_NK := sheet.samples_NK) is not None]
        tries = min(samples_NK.shape[1] for samples_NK in drawn)
        reached_SN = by_unit(np.stack([pass_at_k(samples_NK, tries) for samples_NK in drawn]), sheets[0].units)
        mean, reached = (mean_interval(table_SN, self.confidence) for table_SN in (found[0], reached_SN))
        return mean, reached, tries

    def shifted(self, name: str, measure: str, domains: Sequence[str]) -> dict[int, float]:
        """seed -> a checkpoint's shift: of its weights, or the mean over domains if every one was measured."""
        if (whole := self.shift.get((name, measure, ""))) is not None:
            return dict(whole)
        parts = [self.shift.get((name, measure, domain), {}) for domain in domains]
        shared = [seed for seed in self.seeds if parts and all(seed in part for part in parts)]
        return {seed: float(np.mean([part[seed] for part in parts])) for seed in shared}

    def mean_score(self, role: str) -> Interval | None:
        """Mean over expert domains; None unless every one was scored."""
        found = {d: self.aligned([self.checkpoint(role, d)], d) for d in self.expert_domains}
        whole = {f"{domain}/{HELD_OUT}": scores[0] for domain, scores in found.items() if scores}
        return mean_over_domains(whole, self.confidence) if whole and len(whole) == len(found) else None

    def difference(self, role: str, other: str, domain: str) -> Interval | None:
        """Paired difference of two roles or checkpoints on a domain, held out."""
        found = self.aligned([self.checkpoint(role, domain), self.checkpoint(other, domain)], domain)
        return paired_difference(found[0], found[1], self.confidence) if found else None

    def mean_difference(
        self, role: str, other: str, domains: Sequence[str], new_seeds: bool = False
    ) -> Interval | None:
        """Paired difference, mean over domains; None unless both were scored on every one.

        Args:
            role: A role or checkpoint.
            other: Another.
            domains: The domains.
            new_seeds: The interval is for new seeds as well; None unless all seeds, at least `MIN_SEEDS`, were scored.
        """
        differences = {}
        for domain in domains:
            found = self.aligned([self.checkpoint(role, domain), self.checkpoint(other, domain)], domain)
            if found is None or (new_seeds and not self.speaks_of_seeds(found[0])):
                return None
            differences[f"{domain}/{HELD_OUT}"] = found[0] - found[1]
        if not differences:
            return None
        return (
            over_both(differences, 1.0).interval(self.confidence)
            if new_seeds
            else mean_over(differences, self.confidence)
        )

    def expert_gain(self, expert: str) -> Interval | None:
        """An expert's gain over the start on its own domain."""
        return self.difference(expert, self.start, self.experts[expert].domain)

    def recovery(self, domains: Sequence[str] | None = None, new_seeds: bool = False) -> Interval | None:
        """Recovery over the expert domains, or over some of them; None as for `mean_difference`."""
        triples = {}
        for domain in self.expert_domains if domains is None else domains:
            found = self.aligned([self.start, self.checkpoint("teacher", domain), "student"], domain)
            if found is None or (new_seeds and not self.speaks_of_seeds(found[0])):
                return None
            triples[f"{domain}/{HELD_OUT}"] = Triple(*found)
        if not triples:
            return None
        return recovery(triples, self.confidence, new_seeds=new_seeds)

    def speaks_of_seeds(self, scores_SN: np.ndarray) -> bool:
        """Whether the scores cover every seed, and enough seeds and examples for an interval for new seeds."""
        return len(scores_SN) == len(self.seeds) >= MIN_SEEDS and scores_SN.shape[1] > 1


def metrics(results: Results) -> dict[str, float]:
    """The summary as flat metrics: `eval/DOMAIN/ROLE`, `eval/mean/ROLE`, recovery and forgetting, with `_low`/`_high`.

    Missing measurements have no key.
    """
    values: dict[str, Interval | None] = {}
    for domain in results.domains:
        for role in ROLES:
            values[f"eval/{domain}/{role}"] = results.score(role, domain)
        if domain in results.expert_domains:
            values[f"eval/{domain}/recovery"] = results.recovery([domain])
    for role in ROLES:
        values[f"eval/mean/{role}"] = results.mean_score(role)
    values["eval/recovery"] = results.recovery()
    for domain in results.untrained:
        values[f"eval/forgetting/{domain}"] = results.difference(results.start, "student", domain)
    for domain in results.domains:
        for role in ROLES:
            if drawn := results.sampled(role, domain):
                values[f"eval/{domain}/{role}_sampled"], values[f"eval/{domain}/{role}_pass_at_{drawn[2]}"] = drawn[:2]
    flat = shift_metrics(results)
    for key, value in values.items():
        if value is not None:
            flat |= {key: value.mean, f"{key}_low": value.low, f"{key}_high": value.high}
    return flat
