"""Hypotheses fixed in the run file before anything is measured: the schema. Free of torch and numpy."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from stages.config.training import StrictModel

# Measures with a value per example, so that comparisons are paired by example.
EXAMPLE_MEASURES = ("score", "sampled", "passes", "drop")
# Measures with one value per checkpoint and seed; so are the shifts.
COST_MEASURES = ("seconds", "tokens")

Measure = Literal[
    "score",
    "sampled",
    "passes",
    "drop",
    "kl_start",
    "kl_policy",
    "entropy",
    "length",
    "repetition",
    "changed_bfloat16",
    "changed_float32",
    "rounded_away",
    "seconds",
    "tokens",
]

Expectation = Literal["above", "below", "within", "not_below", "not_above"]


class FitConfig(StrictModel):
    """A quadratic of one measure over checkpoints on another: does it predict?"""

    x: Measure = Field("kl_start", description="What predicts.")
    x_domains: list[str] = Field(min_length=1, description="Domains it is averaged over.")
    checkpoints: list[str | list[str]] = Field(
        min_length=2,
        description="The points: one per checkpoint, a mean over seeds. A nested list holds checkpoints that are not "
        "independent, such as those of one method: they count as one point.",
    )

    @property
    def groups(self) -> list[list[str]]:
        """The independent points, each as its list of checkpoints."""
        return [[one] if isinstance(one, str) else one for one in self.checkpoints]

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        names = [name for group in self.groups for name in group]
        if len(set(names)) < max(5, len(names)):
            raise ValueError("fit.checkpoints: at least five, each of them once")
        return self


class ComparisonConfig(StrictModel):
    """One comparison and what it is expected to show; exactly one of compare, slope, contrast, fit."""

    compare: tuple[str, str] | None = Field(None, description="Two checkpoints: the first less the second.")
    slope: dict[str, float] | None = Field(
        None, description="checkpoint -> setting: the least-squares slope of the measure on the setting."
    )
    contrast: dict[str, float] | None = Field(
        None, description="checkpoint -> weight, of sum 0: the weighted sum of the measure."
    )
    fit: FitConfig | None = Field(None, description="The measure as a quadratic of another one: R squared.")
    measure: Measure = Field(
        "score",
        description="Greedy score, mean score of the sampled completions (pass@1), share of examples with a score "
        "above 0, drop from the start, a shift from the start (kl_start, changed_bfloat16, …), seconds or tokens of "
        "the stage.",
    )
    domains: list[str] | None = Field(
        None,
        description="Domains averaged over; by default those with an expert, for a drop those without.",
    )
    split: Literal["held_out", "out_of_distribution"] = Field("held_out", description="Which examples.")
    expect: Expectation = Field(
        description="above or below 0 (for a fit: R squared above the margin); within ± margin (equivalence); "
        "not below -margin or not above +margin (non-inferiority)."
    )
    margin: float = Field(0.0, ge=0, description="Fixed beforehand, in the measure's unit.")

    @model_validator(mode="after")
    def _is_one_test(self) -> Self:
        ways = [name for name in ("compare", "slope", "contrast", "fit") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError("give exactly one of compare, slope, contrast, fit")
        if self.expect in ("within", "not_below", "not_above") and self.margin <= 0:
            raise ValueError(f"expect: {self.expect} needs a margin above 0")
        if self.expect in ("above", "below") and self.margin and self.fit is None:
            raise ValueError(f"expect: {self.expect} is against 0; a margin goes with within, not_below, not_above")
        if self.fit is not None and self.expect != "above":
            raise ValueError("a fit's R squared can only be expected above a margin")
        if self.fit is not None and self.margin >= 1:
            raise ValueError("the margin of a fit is a share of variance, below 1")
        if self.compare is not None and len(set(self.compare)) < 2:
            raise ValueError("compare: two different checkpoints")
        if self.slope is not None and (len(self.slope) < 3 or len(set(self.slope.values())) < 3):
            raise ValueError("slope: at least three checkpoints with different settings")
        if self.contrast is not None and (len(self.contrast) < 2 or abs(sum(self.contrast.values())) > 1e-9):
            raise ValueError("contrast: at least two checkpoints, with weights of sum 0")
        return self

    @property
    def weights(self) -> Mapping[str, float]:
        """checkpoint -> its weight in the tested sum; empty for a fit."""
        if self.compare is not None:
            return {self.compare[0]: 1.0, self.compare[1]: -1.0}
        if self.slope is not None:
            centre = sum(self.slope.values()) / len(self.slope)
            spread = sum((x - centre) ** 2 for x in self.slope.values())
            return {name: (x - centre) / spread for name, x in self.slope.items()}
        return self.contrast or {}

    @property
    def checkpoints(self) -> list[str]:
        """All checkpoints that the test compares."""
        return [name for group in self.fit.groups for name in group] if self.fit else list(self.weights)


class HypothesisConfig(StrictModel):
    """A claim and the tests that would show it."""

    claim: str = Field(description="What is claimed, in a sentence.")
    note: str = Field("", description="A remark for readers of the result.")
    tests: dict[str, ComparisonConfig] = Field(min_length=1, description="Comparisons, by a name.")
