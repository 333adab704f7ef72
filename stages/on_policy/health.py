"""Monitors the health of an on-policy stage: ends it on a plateau, raises alarms of collapse. Pure and free of torch.

Every quantity is averaged over the last `window` steps that measured it, domain by domain. No check runs before a
domain's first window is full. Only the gap between sampler and trainer is checked in every single step: it is a mean
over many tokens and does not fluctuate. The monitored collapses are the published ones of on-policy distillation:
entropy falls, completions grow, completions repeat themselves (compression ratio).
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from stages.config.on_policy import HealthConfig

# Below this the zlib header and the cold dictionary decide the ratio, not the text.
COMPRESSIBLE_BYTES = 200
# Shares and factors that stand clear of the swings of a healthy run: entropy below this share of its first window's,
# length above this multiple of its first window's, text that zlib shrinks by more than this factor.
MIN_ENTROPY = 0.1
MAX_LENGTH_GROWTH = 2.0
MAX_COMPRESSION = 5.0
# An alarm ends when its value is this share away from the limit: one that swings around it is one alarm, not many.
CLEARANCE = 0.2
# A domain whose entropy (nats per token) is this low from the start has no diversity to lose.
DETERMINISTIC_ENTROPY = 0.02
# Improvements are relative to the best value, and to this constant when the best is near 0: noise around 0 is no
# progress.
SMALLEST_SCALE = 0.01


@dataclass(frozen=True)
class Vitals:
    """The measurements of one step, by domain; a domain without a measurement is absent from the mapping.

    Attributes:
        signal: Reward, or divergence from the teacher in nats.
        entropy: Mean entropy of the policy in nats per token.
        length: Mean tokens of a completion.
        compression: Compression ratio of the completions, as `compression` returns it.
        mismatch: Mean |log-probability of a sampled token by the trainer − by the sampler| in nats, both with the same
            weights; under one name if it was not measured by domain.
    """

    signal: Mapping[str, float]
    entropy: Mapping[str, float]
    length: Mapping[str, float]
    compression: Mapping[str, float]
    mismatch: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HealthVerdict:
    """The conclusion from one step's vitals.

    Attributes:
        alarms: The alarms that began in this step, one line each.
        stop: Why the stage ends here; None if it continues.
    """

    alarms: tuple[str, ...]
    stop: str | None


def compression(texts: Sequence[str]) -> float | None:
    """The zlib compression ratio: bytes before / bytes after, mean over completions.

    Ordinary text of a few hundred bytes stays below 3; a repeated phrase reaches 10 and far more.

    Args:
        texts: Completions of one domain.

    Returns:
        None if no completion has the 200 bytes from which the ratio is meaningful.
    """
    encoded = [text.encode() for text in texts]
    ratios = [len(data) / len(zlib.compress(data)) for data in encoded if len(data) >= COMPRESSIBLE_BYTES]
    return fmean(ratios) if ratios else None


class Health:
    """Checks a stage step by step. The same vitals give the same verdicts, also after restoring a saved `state`."""

    def __init__(
        self, config: HealthConfig, better: Literal["higher", "lower"], state: Mapping[str, Any] | None
    ) -> None:
        """Start monitoring, or continue from a saved state.

        Args:
            config: Limits.
            better: `higher` if the signal is a reward, `lower` if it is a divergence.
            state: The `state` of an earlier attempt; None at a stage's start.
        """
        self.config = config
        self.better = better
        saved = state or {}
        self._recent = {name: dict(values) for name, values in saved.get("recent", {}).items()}
        self._baselines = {name: dict(values) for name, values in saved.get("baselines", {}).items()}
        self._best: dict[str, tuple[float, int]] = {
            domain: (value, step) for domain, (value, step) in saved.get("best", {}).items()
        }
        self._active: set[str] = set(saved.get("sounding", ()))
        self._stop: str | None = saved.get("stop")

    @property
    def stopped(self) -> bool:
        """Whether a verdict has ended the stage."""
        return self._stop is not None

    @property
    def state(self) -> dict[str, Any]:
        """A JSON-serialisable copy of everything a resumed stage needs to continue exactly."""
        return {
            "recent": {name: dict(values) for name, values in self._recent.items()},
            "baselines": {name: dict(values) for name, values in self._baselines.items()},
            "best": {domain: list(found) for domain, found in self._best.items()},
            "sounding": sorted(self._active),
            "stop": self._stop,
        }

    def observe(self, step: int, vitals: Vitals) -> HealthVerdict:
        """Add a step's vitals and return the verdict. A value that is not finite counts as not measured.

        Args:
            step: Counts from 1, in order.
            vitals: The step's measurements.
        """
        alarms = tuple(self._alarms(vitals))
        reasons = [*alarms] if self.config.on_alarm == "stop" else []
        self._note_progress(step, vitals)
        if plateau := self._plateau(step):
            reasons.append(plateau)
        self._stop = "; ".join(reasons) or None
        return HealthVerdict(alarms, self._stop)

    def _smoothed(self, name: str, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        """The mean over the window of each domain measured in this step, once its window is full."""
        recent = self._recent.setdefault(name, {})
        for domain, value in values.items():
            if math.isfinite(value):
                recent[domain] = [*recent.get(domain, ()), value][-self.config.window :]
                if len(recent[domain]) == self.config.window:
                    yield domain, fmean(recent[domain])

    def _baseline(self, name: str, domain: str, mean: float) -> float:
        """The mean of the domain's first full window: the `mean` of the first call."""
        return self._baselines.setdefault(name, {}).setdefault(domain, mean)

    def _alarms(self, vitals: Vitals) -> Iterator[str]:
        """The alarms that begin now; an alarm that has ended may begin again."""
        config = self.config
        for domain, mean in self._smoothed("entropy", vitals.entropy):
            first = self._baseline("entropy", domain, mean)
            limit = MIN_ENTROPY * first
            if first >= DETERMINISTIC_ENTROPY and self._begins(f"entropy/{domain}", mean, limit, below=True):
                yield (
                    f"{domain}: entropy {mean:.3g} nats a token is below {limit:.3g} "
                    f"({MIN_ENTROPY:g} of the first {first:.3g})"
                )
        for domain, mean in self._smoothed("length", vitals.length):
            # Completions that consist of EOS alone have no length to multiply.
            first = max(self._baseline("length", domain, mean), 1.0)
            limit = MAX_LENGTH_GROWTH * first
            if self._begins(f"length/{domain}", mean, limit):
                yield (
                    f"{domain}: length {mean:.4g} tokens is above {limit:.4g} "
                    f"({MAX_LENGTH_GROWTH:g} times the first {first:.4g})"
                )
        for domain, mean in self._smoothed("compression", vitals.compression):
            if self._begins(f"compression/{domain}", mean, MAX_COMPRESSION):
                yield (f"{domain}: compression {mean:.3g} is above {MAX_COMPRESSION:g}: completions repeat themselves")
        for domain, gap in vitals.mismatch.items():
            if self._begins(f"mismatch/{domain}", gap, config.max_mismatch):
                yield (
                    f"{domain}: sampler and trainer differ by {gap:.3g} nats a token, above {config.max_mismatch:g}: "
                    f"the sampler's weights or precision are not the trainer's"
                )

    def _begins(self, alarm: str, value: float, limit: float, below: bool = False) -> bool:
        """Whether an alarm begins now: the value is above its limit, or below it, and the alarm is not active yet.

        NaN begins an alarm. It ends when the value is `CLEARANCE` of the limit away on the right side.
        """
        side = -1 if below else 1
        holds = not side * value <= side * limit
        begins = holds and alarm not in self._active
        if holds:
            self._active.add(alarm)
        elif side * value < side * limit * (1 - side * CLEARANCE):
            self._active.discard(alarm)
        return begins

    def _note_progress(self, step: int, vitals: Vitals) -> None:
        """Record each domain's best mean; a mean within `min_improvement` of the previous best is no improvement."""
        sign = 1.0 if self.better == "higher" else -1.0
        for domain, mean in self._smoothed("signal", vitals.signal):
            if domain in self._best:
                best, _ = self._best[domain]
                if sign * (mean - best) <= self.config.min_improvement * max(abs(best), SMALLEST_SCALE):
                    continue
            self._best[domain] = (mean, step)

    def _plateau(self, step: int) -> str | None:
        """Why the stage has stopped learning, if so."""
        patience = self.config.patience
        if patience is None or not self._best:
            return None
        if step - max(found for _, found in self._best.values()) < patience:
            return None
        best = ", ".join(f"{domain} {value:.4g} at step {found}" for domain, (value, found) in self._best.items())
        return f"no domain improved by {100 * self.config.min_improvement:g} % for {patience} steps (best: {best})"
