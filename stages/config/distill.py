"""The config of the distillation merge: its objective and its teachers. Free of torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.config.on_policy import OnPolicyConfig, Ratio
from stages.config.training import (
    NEUTRAL_DEFAULT,
    NOT_IN_KEY,
    OptimizerConfig,
    Positive,
    Rows,
    Share,
    StrictModel,
    Weight,
)

TeacherWeight = Ratio


class TopKConfig(StrictModel):
    """A divergence over K tokens of the vocabulary instead of all."""

    k: Positive = Field(32, description="Likeliest tokens of a model; the size of the vocabulary is the exact form.")
    support: Literal["student", "teacher", "union", "intersection"] = Field(
        "teacher", description="The model whose likeliest tokens are the support."
    )
    remainder: Literal["renormalise", "correct", "tail"] = Field(
        "tail",
        description="Treatment of the other tokens: both distributions renormalised over the support, the mass "
        "difference added (- S + T), or all others in one bucket.",
    )

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.k == 1 and self.remainder == "renormalise" and self.support != "union":
            raise ValueError("k: 1 renormalised is one token of probability 1 for every student; take a larger k")
        return self


class ObjectiveConfig(StrictModel):
    """The loss of the student's samples against the routed teacher; a name alone selects its defaults."""

    name: Literal["reverse_kl", "forward_kl", "jsd", "entropy_aware", "sampled_reverse_kl", "imitation"] = Field(
        "reverse_kl",
        description="Exact full-vocabulary reverse KL, forward KL, generalised JSD, reverse KL plus forward KL where "
        "the teacher is unsure; the sampled token's log-ratio as a clipped advantage; or the cross-entropy of "
        "completions that the student did not write (SeqKD, with on_policy_fraction 0).",
    )
    top_k: TopKConfig | None = Field(
        None,
        description="Restrict reverse_kl, forward_kl or jsd to K tokens.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="jsd: weight of KL(teacher || mixture), and the teacher's share of the mixture.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    entropy_threshold: Weight = Field(
        0.8,
        description="entropy_aware: the teacher's entropy in nats above which forward KL is added.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    advantage_clip: float = Field(
        5.0, gt=0, allow_inf_nan=True, description="A_max: the sampled log-ratio is clipped to ±A_max."
    )
    importance: Literal["drop", "truncate", "mask"] = Field(
        "drop",
        description="Outside the band the policy/sampler ratio weighs 0 (MiMo), is cut to the upper end (TIS), or "
        "masks the token where trainer and sampler disagree before any update (IcePop).",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token",
        description="Whether trainer and sampler are compared by the token or by the geometric mean over its sequence; "
        "the change by updates on the same batch always counts by the token.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    importance_band: tuple[float, float] = Field((0.5, 2.0), description="The band of the ratio: [low, high].")
    outcome_weight: Weight = Field(0.0, description="alpha: weight of the group-normalised outcome reward.")
    extrapolation: Weight = Field(
        1.0,
        description="lambda: beyond 1 the target lies beyond the teacher, away from the start checkpoint (ExOPD); 1 is "
        "the teacher itself.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    reference_kl: Weight = Field(
        0.0,
        description="Weight of the reverse KL against the start checkpoint, against length inflation (about 0.01).",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    golden_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the loss that is cross-entropy on the domains' gold answers (about 0.1).",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    chunk_tokens: Positive | None = Field(
        None,
        description="Tokens whose logits exist at the same time; as many as fit into 64 MiB when absent.",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="before")
    @classmethod
    def _takes_a_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        low, high = self.importance_band
        if not 0 <= low < 1 < high:
            raise ValueError("importance_band must be [low, high] with 0 <= low < 1 < high")
        if self.top_k is not None and self.name not in ("reverse_kl", "forward_kl", "jsd"):
            raise ValueError(f"top_k restricts reverse_kl, forward_kl or jsd; {self.name} has no top-k form")
        for option, owner in (("beta", "jsd"), ("entropy_threshold", "entropy_aware")):
            if self.name != owner and self._is_set(option):
                raise ValueError(f"{option} belongs to {owner}; the objective is {self.name}")
        if self.name == "imitation" and (self.extrapolation != 1.0 or self.outcome_weight):
            raise ValueError("imitation has no target to extrapolate and no own completions to reward")
        if self.name != "sampled_reverse_kl" and not self.outcome_weight:
            for option in ("importance", "importance_level"):
                if self._is_set(option):
                    raise ValueError(
                        f"{option} belongs to sampled_reverse_kl or an outcome_weight; the exact {self.name} weighs "
                        f"every token by 1"
                    )
        return self

    def _is_set(self, option: str) -> bool:
        return bool(getattr(self, option) != type(self).model_fields[option].default)


class DistillConfig(OnPolicyConfig):
    """Multi-teacher on-policy distillation: the loop with the routed teacher's signal."""

    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="The teacher's signal.")
    group_size: Annotated[int, Field(gt=0, le=2**14)] = Field(1, description="Completions sampled for each prompt.")
    prompts_per_step: Rows = Field(80, description="Distinct prompts of one step, spread over the domains.")
    domain_weights: dict[str, Ratio] = Field(
        default_factory=dict, description="Share of prompts of a domain, relative to 1."
    )
    teacher_weights: dict[str, dict[str, TeacherWeight]] = Field(
        default_factory=dict,
        description="domain -> teacher -> weight, for domains with several teachers; the target is their geometric "
        "mean.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    on_policy_fraction: Share = Field(
        1.0,
        description="Share of prompts that the student answers itself; the others get completions from `off_policy`.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    off_policy: Literal["teacher", "dataset"] = Field(
        "teacher",
        description="Completions of the other prompts: the routed teacher's own, or the domain's gold answers.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    teacher_backend: Literal["local", "vllm_server"] = Field(
        "local",
        description="Where teachers score: in the trainer's own process, or on vLLM servers "
        "(`resources.teacher_servers`), which report a teacher's likeliest tokens and the sampled one.",
        json_schema_extra=NEUTRAL_DEFAULT,
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
        """The fields that decide the result; `off_policy` is not one if the student answers all prompts."""
        values = super().key_fields()
        if self.on_policy_fraction == 1.0:
            values.pop("off_policy", None)
        return values

    @model_validator(mode="after")
    def _imitates_others(self) -> Self:
        if self.objective.name == "imitation" and self.on_policy_fraction > 0:
            raise ValueError(
                "objective: imitation learns from completions of others; it needs an on_policy_fraction of 0"
            )
        return self

    @model_validator(mode="after")
    def _servers_report_enough(self) -> Self:
        if self.teacher_backend == "local":
            return self
        top_k = self.objective.top_k
        if self.objective.name != "sampled_reverse_kl" and (top_k is None or top_k.support != "teacher"):
            raise ValueError(
                f"teacher_backend: vllm_server reports the sampled token's log-probability and the teacher's likeliest "
                f"ones; objective {self.objective.name} needs more of the teacher. Use sampled_reverse_kl, or top_k "
                f"with support: teacher"
            )
        if top_k is not None and self.objective.extrapolation != 1.0:
            raise ValueError("teacher_backend: vllm_server extrapolates with sampled_reverse_kl only, not with top_k")
        if self.temperature != 1.0:
            raise ValueError("teacher_backend: vllm_server reports log-probabilities at temperature 1 only")
        if self.teacher_weights:
            raise ValueError("teacher_backend: vllm_server takes one teacher per domain")
        if self.on_policy_fraction < 1 and self.off_policy == "teacher":
            raise ValueError("teacher_backend: vllm_server only scores; off_policy: teacher needs local teachers")
        return self

    @model_validator(mode="after")
    def _noise_has_a_reward(self) -> Self:
        if self.reward_noise != type(self.reward_noise)() and not self.objective.outcome_weight:
            raise ValueError(
                "reward_noise has no effect without a reward; set objective.outcome_weight, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _reward_has_a_group(self) -> Self:
        if self.objective.outcome_weight > 0 and self.group_size < 2:
            raise ValueError("objective.outcome_weight compares rewards in a group; it needs a group_size of 2 or more")
        if self.on_policy_fraction < 1 and self.off_policy == "dataset" and self.group_size > 1:
            raise ValueError("off_policy: dataset has one completion per prompt; it needs a group_size of 1")
        return self
