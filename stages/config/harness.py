"""The run file's settings for lm-evaluation-harness tasks. Imports neither torch nor the harness."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from base.errors import nearest
from experts.domain import HELD_OUT
from stages.config.evaluation import EvaluationConfig
from stages.config.training import NOT_IN_KEY, Float32Matmul, Positive, StrictModel, each_once

# Tasks appear beside the run's own domains in every table; the prefix distinguishes them.
PREFIX = "harness."


class HarnessConfig(StrictModel):
    """Tasks of lm-evaluation-harness, each measured on every checkpoint as one more domain, `harness.TASK`."""

    tasks: list[str] = Field(min_length=1, description="Names of tasks: the harness's own, or those of include_path.")
    limit: Positive | None = Field(None, description="First examples of each task; all of them when absent.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Solved examples before each question; the task's own number when absent."
    )
    include_path: str | None = Field(None, description="A directory of task YAMLs of your own.")
    metrics: dict[str, str] = Field(
        default_factory=dict,
        description="TASK -> the metric that is its score, METRIC or METRIC,FILTER; by default the first it lists.",
    )
    chat_template: bool = Field(False, description="Put each question into the model's chat template.")
    batch_size: Positive = Field(16, description="Sequences scored together; sampled completions depend on it.")

    @field_validator("tasks")
    @classmethod
    def _are_named_once(cls, value: list[str]) -> list[str]:
        if odd := next((name for name in value if not name or set(name) & set("/@*? ")), None):
            raise ValueError(f"{odd!r} is no task's name")
        each_once(value)
        return value

    @model_validator(mode="after")
    def _metrics_are_of_its_tasks(self) -> Self:
        if stray := next((name for name in self.metrics if name not in self.tasks), None):
            raise ValueError(f"metrics: '{stray}' is not among tasks{nearest(stray, self.tasks)}")
        return self


class HarnessTaskConfig(StrictModel):
    """One task on one checkpoint.

    Attributes:
        file: The task's YAML under include_path; None for one of the harness's own, which its version pins.
    """

    task: str
    domain: str
    split: str = HELD_OUT
    limit: int | None
    num_fewshot: int | None
    metric: str | None
    chat_template: bool
    batch_size: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    float32_matmul: Float32Matmul = "highest"
    file: str | None = Field(None, json_schema_extra=NOT_IN_KEY)

    @classmethod
    def of(cls, config: HarnessConfig, task: str, file: str | None, evaluation: EvaluationConfig) -> Self:
        """The part of the run file's entry that concerns one task, with the number types of its evaluations."""
        return cls(
            task=task,
            domain=f"{PREFIX}{task}",
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            metric=config.metrics.get(task),
            chat_template=config.chat_template,
            batch_size=config.batch_size,
            dtype=evaluation.dtype,
            float32_matmul=evaluation.float32_matmul,
            file=file,
        )
