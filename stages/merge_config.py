"""The config of a weight merge. Free of torch."""

from typing import Annotated, Literal

from pydantic import Field

from stages.config import StrictModel


class WeightMergeConfig(StrictModel):
    """One student by arithmetic on the experts' weights."""

    method: Literal["weight_average", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = Field(
        description="How the experts' weights become one."
    )
    scale: float = Field(1.0, ge=0, description="Factor of the merged task vector.")
    density: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="Share of each task vector that is kept.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="An expert's weight, relative to 1."
    )
