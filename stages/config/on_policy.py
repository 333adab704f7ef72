"""The configs of on-policy training: the loop's, and those of the RL and RFT stages. Free of torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stages.config.training import (
    NOT_IN_KEY,
    STOP,
    NewTokens,
    OptimizerConfig,
    Positive,
    Rows,
    StopList,
    StrictModel,
    Temperature,
    TrainConfig,
    Weight,
)

# Only ratios count; the bounds keep them finite.
Ratio = Annotated[float, Field(ge=1e-6, le=1e6)]
# A year.
MOST_SECONDS = 365 * 86_400

# Prefix of a histogram bin's name, as in `distill/advantage_from_0.1_to_1/sort`.
HISTOGRAM = "advantage_from_"
# vLLM samples lower temperatures as this one.
LEAST_VLLM_TEMPERATURE = 0.01


def temperature_fault(
    temperature: float, backend: str | None, otherwise: str = "sampler.backend: transformers"
) -> str | None:
    """Why a sampler cannot draw at a temperature; None if it can.

    Args:
        temperature: The temperature.
        backend: The sampler's backend.
        otherwise: The setting with another backend, for the message.
    """
    if backend not in ("vllm", "vllm_server") or temperature >= LEAST_VLLM_TEMPERATURE:
        return None
    return (
        f"temperature: {temperature:g} is below {LEAST_VLLM_TEMPERATURE}, and {backend} would sample at "
        f"{LEAST_VLLM_TEMPERATURE} in its place; take {LEAST_VLLM_TEMPERATURE}, or {otherwise}"
    )


def vllm_reports(temperature: float, top_p: float) -> bool:
    """Whether vLLM can report the log-probabilities of a policy at a temperature before top-p."""
    return temperature in (0.0, 1.0) or top_p == 1.0


class HealthConfig(StrictModel):
    """Conditions that end an on-policy stage early, or raise an alarm in its log. Every decision is logged."""

    patience: Positive | None = Field(
        None,
        description="Stop when no domain's smoothed signal (reward, or divergence from the teacher) has improved for "
        "this many steps; never when absent.",
    )
    min_improvement: float = Field(0.01, gt=0, description="Relative change that counts as an improvement.")
    window: Positive = Field(10, description="Steps over which a signal is averaged.")
    max_mismatch: float = Field(
        0.1,
        gt=0,
        description="Alarm when sampler and trainer with the same weights differ by more than this in the "
        "log-probability of a sampled token, in nats on the mean of a domain.",
    )
    on_alarm: Literal["warn", "stop"] = Field("warn", description="Only log an alarm, or end the stage with it.")

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result: only those that can end the stage."""
        values = super().key_fields()
        idle = [] if self.on_alarm == "stop" else ["max_mismatch"]
        if self.patience is None:
            idle += ["min_improvement", *(["window"] if self.on_alarm == "warn" else [])]
        return {name: value for name, value in values.items() if name not in idle}


class MonitorConfig(StrictModel):
    """Scores of the student during training: a learning curve for each domain."""

    every: Positive = Field(50, description="Steps between two measurements.")
    examples: Positive = Field(100, description="Held-out examples of each domain, greedy.")


class SamplerConfig(StrictModel):
    """The sampler of the student's completions."""

    backend: Literal["transformers", "vllm", "vllm_server"] | None = Field(
        None,
        description="transformers or vLLM in each of the trainer's processes, or vLLM servers "
        "(`resources.rollout_servers`); "
        "`resources.sampler` when absent.",
    )
    memory_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4,
        description="vllm: share of each device's memory for weights and cache while it samples; on a GPU the engine "
        "sleeps during the update.",
        json_schema_extra=NOT_IN_KEY,
    )
    ahead: bool = Field(
        False,
        description="vllm_server: sample the next batch while the current one is trained on, with weights one batch "
        "old; losses with an importance weight correct for it.",
    )
    max_staleness: int = Field(
        1,
        ge=0,
        le=10**6,
        description="Batches of updates by which the student may be newer than the weights that drew a completion; an "
        "older group is dropped and counted.",
    )
    timeout_seconds: float = Field(
        600,
        gt=0,
        le=MOST_SECONDS,
        description="vllm_server: longest time for one answer, such as one prompt's completions.",
        json_schema_extra=NOT_IN_KEY,
    )
    start_seconds: float = Field(
        600,
        gt=0,
        le=MOST_SECONDS,
        description="vllm_server: longest time until a server has started and takes the student's weights.",
        json_schema_extra=NOT_IN_KEY,
    )
    retries: int = Field(
        3,
        ge=0,
        le=1000,
        description="vllm_server: new attempts at a step's missing completions, when every server has failed.",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="after")
    def _ahead_is_stale(self) -> Self:
        if self.ahead and self.max_staleness < 1:
            raise ValueError("ahead samples with weights one batch old; it needs a max_staleness of 1 or more")
        if self.ahead and self.backend in ("transformers", "vllm"):
            raise ValueError(f"ahead needs servers that sample while the trainer updates; backend is {self.backend}")
        return self


class OnPolicyConfig(TrainConfig):
    """The one on-policy loop: sample with the student, score the samples, update."""

    own_dropout: ClassVar[bool] = False

    prompts_per_step: Rows = Field(16, description="Distinct prompts of one step, over all domains.")
    group_size: Annotated[int, Field(gt=0, le=2**14)] = Field(8, description="Completions sampled for each prompt.")
    max_new_tokens: NewTokens = Field(64, description="Longest completion; a longer one is cut and has no EOS.")
    temperature: Temperature = Field(1.0, description="Sampling temperature; the loss uses the same.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus sampling threshold.")
    stop: StopList = Field((), description=STOP)
    updates_per_batch: Annotated[int, Field(gt=0, le=10_000)] = Field(
        1, description="Optimizer updates made on each batch of rollouts."
    )
    sampler: SamplerConfig = Field(
        default_factory=SamplerConfig,
        description="How the completions are sampled.",
    )
    loss_normalisation: Literal["token", "sequence", "domain"] = Field(
        "token",
        description="Mean over all tokens; the mean over sequences of each one's own mean; or the mean over domains "
        "of each one's token mean, so that a domain of long answers does not dominate the gradient.",
    )
    max_domain_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Budget: no domain has more than this share of the loss; the excess goes to the others.",
    )
    preflight_tolerance: float = Field(
        0.0,
        ge=0,
        description="Largest gap between two forward passes of one model, in nats, that the preflight and a hand-over "
        "of weights accept; 0 means 1e-3 in float32 and 0.25 in bfloat16.",
        json_schema_extra=NOT_IN_KEY,
    )
    health: HealthConfig = Field(
        default_factory=HealthConfig,
        description="Early stop and alarms.",
    )
    monitor: MonitorConfig | None = Field(
        None, description="Measure the student during training.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _temperature_is_sampled(self) -> Self:
        if fault := temperature_fault(self.temperature, self.sampler.backend):
            raise ValueError(fault)
        return self


class RLConfig(OnPolicyConfig):
    """GRPO family: group-normalised verifiable reward, no critic, asymmetric clip."""

    group_size: Annotated[int, Field(ge=2, le=2**14)] = Field(
        8, description="Completions sampled for each prompt; their rewards are compared, so 2 or more."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0, le=1e3, description="The ratio is clipped above at 1 + clip_high (DAPO).")
    normalise_by_std: bool = Field(True, description="Divide a group's advantages by its standard deviation.")
    reference_kl: Weight = Field(
        0.0,
        description="Weight of the reverse KL against the start checkpoint, exact over the vocabulary: the KL penalty.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4), description="Optimizer and schedule."
    )


class RFTConfig(OnPolicyConfig):
    """Rejection-sampled fine-tuning: cross-entropy on the policy's own completions that pass."""

    pass_score: float = Field(1.0, gt=0, le=1, description="A completion with this score or more is imitated.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4), description="Optimizer and schedule."
    )
