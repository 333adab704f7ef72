"""The run file's settings of measurements and of the gate."""

from typing import Any, Literal

from pydantic import Field, field_validator

from stages.config.harness import PREFIX, HarnessConfig
from stages.config.shift import ShiftConfig
from stages.config.training import (
    AllOrNames,
    EvaluationConfig,
    StrictModel,
)


class EvaluateConfig(EvaluationConfig):
    """The measurements of every checkpoint."""

    domains: AllOrNames = Field("all", description="Domains scored.")
    expert_panel: Literal["all"] | list[str] | None = Field(
        None,
        description="Domains on which every expert is scored besides its own and those it teaches: all, or a list; "
        "when absent all with up to 8 experts, and with more at most 4 that no expert trains.",
    )
    shift: ShiftConfig | None = Field(
        default_factory=ShiftConfig, description="How far trained checkpoints moved from the start; null measures none."
    )
    harness: HarnessConfig | None = Field(None, description="Additional tasks, of lm-evaluation-harness.")

    @property
    def harness_domains(self) -> list[str]:
        """Names of the harness's tasks among the domains."""
        return [f"{PREFIX}{task}" for task in self.harness.tasks] if self.harness else []

    @field_validator("expert_panel")
    @classmethod
    def _named_once(cls, value: Any) -> Any:
        if twice := next((name for name in value or () if list(value).count(name) > 1 and value != "all"), None):
            raise ValueError(f"'{twice}' is named twice")
        return value


class GateConfig(StrictModel):
    """The requirements for a student to become champion."""

    non_inferiority_margin: float = Field(
        0.08,
        gt=0,
        lt=1,
        description="Allowed deficit to the teacher of each domain, in score (1 is all right); the interval's lower "
        "bound decides.",
    )
    max_forgetting: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Allowed mean drop on domains no expert trains, in score (1 is all right); the estimate decides.",
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="Level of all intervals.")
