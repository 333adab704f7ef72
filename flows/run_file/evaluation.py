"""The run file's settings of measurements and of the gate."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.config.evaluation import EvaluationConfig
from stages.config.harness import PREFIX, HarnessConfig
from stages.config.shift import ShiftConfig
from stages.config.training import AllOrNames, StrictModel, each_once


class EvaluateConfig(EvaluationConfig):
    """The measurements of every checkpoint."""

    domains: AllOrNames = Field("all", description="Domains scored.")
    expert_panel: Annotated[Literal["all"] | list[str] | None, AfterValidator(each_once)] = Field(
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
