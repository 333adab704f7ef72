"""How far checkpoints moved from the start, as a table and as metrics. Free of torch.

Shape suffixes: `S` seeds, `N` examples.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from evals.statistics.crossed_effects import over_both
from evals.statistics.interval import Interval
from evals.tables.grid import ABSENT, Grid

if TYPE_CHECKING:
    from evals.comparison.results import Results


@dataclass(frozen=True)
class Move:
    """The shift of one checkpoint: means over seeds, and over domains if there are several; None if not measured.

    Attributes:
        name: Node name.
        kl_own: KL(start || checkpoint) in nats a token on its own domains: those it was trained on, or all experts'.
        kl_others: KL(start || checkpoint) on the other domains.
        kl_policy: KL(checkpoint || start) along its own completions, on its own domains.
        entropy: Nats per token along its own completions, on its own domains.
        length: Tokens per completion on its own domains.
        repetition: Compression ratio of the completions on its own domains.
        changed_bfloat16: Share of weights changed, rounded to bfloat16.
        changed_float32: Share of weights changed.
        relative_norm: Norm of the task vector, relative to that of the start's weights.
    """

    name: str
    kl_own: float | None
    kl_others: float | None
    kl_policy: float | None
    entropy: float | None
    length: float | None
    repetition: float | None
    changed_bfloat16: float | None
    changed_float32: float | None
    relative_norm: float | None


def domains_of(results: "Results", name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A checkpoint's own domains (those it was trained on) and the others, among those it was measured on."""
    measured = {domain for checkpoint, _, domain in results.shift if domain and checkpoint == name}
    expert = results.experts.get(name)
    own = results.expert_domains if expert is None else (expert.domain,)
    domains = [domain for domain in results.domains if domain in measured]
    return tuple(d for d in domains if d in own), tuple(d for d in domains if d not in own)


def moves(results: "Results") -> list[Move]:
    """Every checkpoint with a measured shift, in the run's order."""
    measured = {name for name, _, _ in results.shift}
    return [_move(results, name) for name in results.checkpoints if name in measured]


def _move(results: "Results", name: str) -> Move:
    own, others = domains_of(results, name)

    def mean(measure: str, domains: tuple[str, ...] = own) -> float | None:
        values = results.shifted(name, measure, domains)
        return fmean(values.values()) if values else None

    more = ("kl_policy", "entropy", "length", "repetition", "changed_bfloat16", "changed_float32", "relative_norm")
    return Move(name, mean("kl_start"), mean("kl_start", others), **{measure: mean(measure) for measure in more})


def kl_interval(results: "Results", name: str, domains: tuple[str, ...]) -> Interval | None:
    """KL(start || checkpoint), mean over domains, with an interval for new seeds and examples.

    Returns:
        None unless every seed was measured on all domains and there are enough seeds.
    """
    parts = {domain: results.kl_examples.get((name, domain), {}) for domain in domains}
    seeds = [seed for seed in results.seeds if parts and all(seed in part for part in parts.values())]
    tables = {domain: np.stack([part[seed] for seed in seeds]) for domain, part in parts.items() if seeds}
    if not tables or not all(results.speaks_of_seeds(table_SN) for table_SN in tables.values()):
        return None
    return over_both(tables).interval(results.confidence)


def shift_grid(results: "Results", narrow: bool = False) -> Grid | None:
    """The shift from the start, one row per checkpoint; None where none was measured.

    Args:
        results: The run's results.
        narrow: Show half the interval's width instead of its bounds, for a terminal of eighty columns.
    """
    rows = []
    for move in moves(results):
        own, others = domains_of(results, move.name)
        kl = [
            _kl(mean, kl_interval(results, move.name, domains), narrow)
            for mean, domains in ((move.kl_own, own), (move.kl_others, others))
        ]
        shape = [
            _number(value, digits) for value, digits in ((move.entropy, 3), (move.length, 1), (move.repetition, 2))
        ]
        changed = [_number(None if v is None else 100 * v, 1) for v in (move.changed_bfloat16, move.changed_float32)]
        rows.append((move.name.removeprefix("experts/"), *kl, *shape, *changed))
    title = (
        "Shift from the start: KL(start‖checkpoint) in nats a token on its own domains and on the others; entropy, "
        "tokens and repetition of its own completions on its own; % of weights changed in bf16 and fp32"
    )
    head = ("checkpoint", "KL own", "KL others", "entropy", "length", "repeats", "bf16", "fp32")
    return Grid(title, head, tuple(rows)) if rows else None


def cosines_grid(results: "Results") -> Grid | None:
    """Cosines of the experts' task vectors, means over seeds; None where none were measured."""
    names = list(dict.fromkeys(name for pair in results.cosines for name in pair))
    if not names:
        return None
    means = {pair: fmean(values.values()) for pair, values in results.cosines.items()}
    whole = means | {(other, one): value for (one, other), value in means.items()}
    rows = [(one, *(_number(whole.get((one, other)), 3) for other in names)) for one in names]
    return Grid("Cosines of the experts' task vectors (weights less the start's)", ("", *names), tuple(rows))


def shift_metrics(results: "Results") -> dict[str, float]:
    """The shifts as metrics: `shift/CHECKPOINT/MEASURE`, with `_low`/`_high` of KL, and `shift/cosine/ONE/OTHER`."""
    flat: dict[str, float] = {}
    for move in moves(results):
        values = {name: value for name, value in vars(move).items() if name != "name" and value is not None}
        own, others = domains_of(results, move.name)
        for name, domains in (("kl_own", own), ("kl_others", others)):
            if interval := kl_interval(results, move.name, domains):
                values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        flat |= {f"shift/{move.name}/{name}": value for name, value in values.items()}
    cosines = {pair: fmean(values.values()) for pair, values in results.cosines.items()}
    return flat | {f"shift/cosine/{one}/{other}": value for (one, other), value in cosines.items()}


def _kl(mean: float | None, interval: Interval | None, narrow: bool) -> str:
    if mean is None or interval is None:
        return ABSENT if mean is None else f"{mean:#.3g}"
    if narrow:
        return f"{mean:#.3g} ±{(interval.high - interval.low) / 2:.2g}"
    return f"{mean:#.3g} [{interval.low:#.3g}, {interval.high:#.3g}]"


def _number(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"
