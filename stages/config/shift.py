"""The config of the shift, the distance of a checkpoint from the run's start. Free of torch."""

from typing import Literal

from pydantic import Field

from stages.config.training import Float32Matmul, NewTokens, Positive, Rows, StrictModel, Temperature


class ShiftConfig(StrictModel):
    """How a checkpoint's distance from the run's start is measured."""

    examples: Positive = Field(
        64, description="Held-out examples of each domain, one completion each; at most evaluate.examples."
    )
    temperature: Temperature = Field(
        1.0, description="Temperature of the completions and of the distributions that are compared."
    )


class ShiftRequest(ShiftConfig):
    """The node's full config: more fields, taken from `evaluate`."""

    max_new_tokens: NewTokens = Field(description="Longest completion.")
    batch_size: Rows = Field(description="Sequences sampled together.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number type of products.")
    float32_matmul: Float32Matmul = Field("highest", description="Products of float32.")
    split: Literal["held_out"] = Field("held_out", description="Whose prompts.")
