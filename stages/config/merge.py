"""The config of a weight merge. Free of torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.config.training import StrictModel

Method = Literal["weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties"]

# The papers' own values without a validation set: Ilharco et al. 2023 for sums, Yadav et al. 2023 for disjoint means.
SCALES = {"task_arithmetic": 0.4, "ties": 1.0, "dare_linear": 0.4, "dare_ties": 1.0}
# TIES keeps the top 20 %; up to 90 % of the deltas can be dropped at random without loss (Yu et al. 2024).
DENSITIES = {"ties": 0.2, "dare_linear": 0.2, "dare_ties": 0.2}
DEFAULTS = {"scale": SCALES, "density": DENSITIES}


class WeightMergeConfig(StrictModel):
    """One student by arithmetic on the experts' weights.

    A task vector is an expert's weights less the start's. `scale` and `density` are filled in by the method.
    """

    method: Method = Field(
        description="The weighted mean of the experts' weights; the start plus the scaled sum of their task vectors "
        "(task_arithmetic); of the trimmed ones, the mean of those that agree with the elected sign (ties); or either "
        "after weights of each were dropped at random and the rest scaled up (dare_linear, dare_ties)."
    )
    scale: float | None = Field(
        None,
        ge=0,
        le=100,
        description="lambda: factor of the merged task vector, which is the sum over experts in task_arithmetic and "
        "dare_linear (0.4 when absent) and the mean of those that agree in ties and dare_ties (1 when absent).",
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="ties, dare_linear, dare_ties: share of each tensor of a task vector that is kept, the largest "
        "(ties) or any; 0.2 when absent.",
    )
    weights: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] = Field(
        default_factory=dict,
        description="Weight of an expert relative to the others, 1 when absent; their mean is scaled to 1, so equal "
        "weights change nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _takes_the_methods_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        filled = {option: by_method.get(str(value.get("method"))) for option, by_method in DEFAULTS.items()}
        return filled | {option: given for option, given in value.items() if given is not None}

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for option, by_method in DEFAULTS.items():
            if getattr(self, option) is not None and self.method not in by_method:
                raise ValueError(f"{option} belongs to {', '.join(by_method)}; the method is {self.method}")
        return self
