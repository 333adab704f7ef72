"""The config of the distillation merge: its objective and its teachers. Free of torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.config.objective import IMITATION, SAMPLED, ObjectiveConfig, ReverseKL
from stages.config.on_policy import OnPolicyConfig, Ratio
from stages.config.training import (
    NOT_IN_KEY,
    OptimizerConfig,
    Positive,
    Rows,
    Share,
)

TeacherWeight = Ratio


class DistillSettings(OnPolicyConfig):
    """A run file's settings of multi-teacher on-policy distillation: the loop with the routed teacher's signal."""

    objective: ObjectiveConfig = Field(
        default_factory=lambda: ReverseKL(type="reverse_kl"),
        description="The loss of the student's samples against the routed teacher; a type's name alone selects its "
        "defaults.",
    )
    group_size: Annotated[int, Field(gt=0, le=2**14)] = Field(1, description="Completions sampled for each prompt.")
    prompts_per_step: Rows = Field(80, description="Distinct prompts of one step, spread over the domains.")
    domain_weights: dict[str, Ratio] = Field(
        default_factory=dict, description="Share of prompts of a domain, relative to 1."
    )
    on_policy_fraction: Share = Field(
        1.0,
        description="Share of prompts that the student answers itself; the others get completions from `off_policy`.",
    )
    off_policy: Literal["teacher", "dataset"] = Field(
        "teacher",
        description="Completions of the other prompts: the routed teacher's own, or the domain's gold answers.",
    )
    teacher_backend: Literal["local", "vllm_server"] = Field(
        "local",
        description="Where teachers score: in the trainer's own process, or on vLLM servers "
        "(`resources.teacher_servers`), which report a teacher's likeliest tokens and the sampled one.",
    )
    max_resident: Positive = Field(
        8,
        description="Full teacher checkpoints on the device at the same time; of the others only the output heads, "
        "while a step needs them. On a GPU the others wait in the host's memory if it has room, else they are "
        "read again.",
        json_schema_extra=NOT_IN_KEY,
    )
    teacher_cache: Literal["device", "cpu"] = Field(
        "device",
        description="Where the teachers' hidden states are stored until the updates of one rollout.",
        json_schema_extra=NOT_IN_KEY,
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3), description="Optimizer and schedule."
    )

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result: `off_policy` unless the student answers all prompts; no ratio of 1."""
        values = super().key_fields()
        unequal = {domain: ratio for domain, ratio in values.pop("domain_weights", {}).items() if ratio != 1.0}
        values |= {"domain_weights": unequal} if unequal else {}
        if self.on_policy_fraction == 1.0:
            values.pop("off_policy", None)
        return values

    @model_validator(mode="after")
    def _imitates_others(self) -> Self:
        if self.objective.type == IMITATION and self.on_policy_fraction > 0:
            raise ValueError(
                "objective: imitation learns from completions of others; it needs an on_policy_fraction of 0"
            )
        return self

    @model_validator(mode="after")
    def _servers_report_enough(self) -> Self:
        if self.teacher_backend == "local":
            return self
        top_k = self.objective.likeliest
        if self.objective.type != SAMPLED and (top_k is None or top_k.support != "teacher"):
            raise ValueError(
                f"teacher_backend: vllm_server reports the sampled token's log-probability and the teacher's likeliest "
                f"ones; objective {self.objective.type} needs more of the teacher. Use sampled_reverse_kl, or top_k "
                f"with support: teacher"
            )
        if top_k is not None and self.objective.extrapolates:
            raise ValueError("teacher_backend: vllm_server extrapolates with sampled_reverse_kl only, not with top_k")
        if self.temperature != 1.0:
            raise ValueError("teacher_backend: vllm_server reports log-probabilities at temperature 1 only")
        if self.on_policy_fraction < 1 and self.off_policy == "teacher":
            raise ValueError("teacher_backend: vllm_server only scores; off_policy: teacher needs local teachers")
        return self

    @model_validator(mode="after")
    def _reward_has_a_group(self) -> Self:
        if self.objective.rewarded and self.group_size < 2:
            raise ValueError("objective.outcome_weight compares rewards in a group; it needs a group_size of 2 or more")
        if self.on_policy_fraction < 1 and self.off_policy == "dataset" and self.group_size > 1:
            raise ValueError("off_policy: dataset has one completion per prompt; it needs a group_size of 1")
        return self


class DistillConfig(DistillSettings):
    """The config of the distillation stage: a run file's settings, and what the plan takes from its routes."""

    teacher_weights: dict[str, dict[str, TeacherWeight]] = Field(
        default_factory=dict,
        description="domain -> teacher -> weight, for domains with several teachers; the target is their geometric "
        "mean.",
    )

    @model_validator(mode="after")
    def _servers_score_for_one(self) -> Self:
        if self.teacher_backend == "vllm_server" and self.teacher_weights:
            raise ValueError("teacher_backend: vllm_server takes one teacher per domain")
        return self
