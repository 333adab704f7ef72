"""The stages' configs: what a run file may say about each stage, with defaults. Free of torch.

A field marked `not_in_key` changes how a stage runs, never its result, and stays out of the content key. One marked
`neutral_default` was added after checkpoints had been made without it: at its default it means what its absence meant,
and stays out of the key, so that a new option makes no finished stage run again.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# Only ratios count; the bounds keep them finite.
TeacherWeight = Annotated[float, Field(ge=1e-6, le=1e6)]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}
NEUTRAL_DEFAULT: dict[str, Any] = {"neutral_default": True}


class StrictModel(BaseModel):
    """A config whose unknown keys are errors and whose values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON-serialisable values."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            default = field.get_default(call_default_factory=True, validated_data={})
            at_default = _key_value(getattr(self, name)) == _key_value(default)
            if extra.get("not_in_key") or (extra.get("neutral_default") and at_default):
                del values[name]
            elif isinstance(nested := getattr(self, name), StrictModel):
                values[name] = nested.key_fields()
        return values


def _key_value(value: Any) -> Any:
    return value.key_fields() if isinstance(value, StrictModel) else value


class OptimizerConfig(StrictModel):
    """AdamW with a learning-rate schedule."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's beta1 and beta2.")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Gradients are clipped to this global norm; .inf clips nothing."
    )


class LoraConfig(StrictModel):
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: Positive = Field(16, description="Rank of the adapters.")
    alpha: Positive = Field(32, description="Scale numerator: the update is scaled by alpha / rank.")
    dropout: Share = Field(0.0, description="Dropout on the adapters' input.")
    target_modules: str | list[str] = Field("all-linear", description="Modules that get an adapter.")


class TrainConfig(StrictModel):
    """What every training stage shares."""

    max_steps: Positive = Field(100, description="Optimizer steps (SFT) or rollout steps (on-policy).")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer and schedule.")
    lora: LoraConfig | None = Field(None, description="Train adapters; full fine-tuning when absent.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Autocast type; weights stay float32.")
    micro_batch_tokens: Positive = Field(
        16384, description="Padded tokens of one forward and backward pass; larger batches accumulate gradients."
    )
    examples: Positive = Field(3000, description="Distinct training examples drawn from each domain.")
    save_every: Positive = Field(25, description="Steps between saved states.", json_schema_extra=NOT_IN_KEY)
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="Over several devices: a whole copy on each (DDP), or weights, gradients and optimizer state "
        "sharded over them (FSDP2).",
        json_schema_extra=NOT_IN_KEY,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, about a third more time.",
        json_schema_extra=NOT_IN_KEY,
    )


class TinyModelConfig(StrictModel):
    """A small Qwen3 made from scratch."""

    hidden_size: Positive = Field(128, description="Width.")
    layers: Positive = Field(3, description="Decoder layers.")
    heads: Positive = Field(4, description="Attention heads (and key-value heads).")
    intermediate_size: Positive = Field(256, description="Width of the feed-forward layer.")
    max_length: Positive = Field(512, description="Longest sequence.")


class PretrainConfig(TrainConfig):
    """Pretraining of a tiny model from scratch on rough demonstrations of the domains."""

    model: TinyModelConfig = Field(default_factory=TinyModelConfig, description="The architecture.")
    domains: Literal["all"] | list[str] = Field("all", description="Domains in the corpus.")
    max_steps: Positive = Field(450, description="Optimizer steps.")
    batch_tokens: Positive = Field(2048, description="Tokens of one step.")
    prompt_weight: Share = Field(0.2, description="Loss weight of prompt tokens.")
    lora: None = Field(None, description="A model from scratch has no base for adapters.")
    wrong_answers: Share = Field(0.05, description="Share of documents that end in another example's answer.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=6e-3, schedule="cosine", warmup_steps=20),
        description="Optimizer and schedule.",
    )


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations; the loss is on completion tokens only."""

    batch_size: Positive = Field(64, description="Examples of one step.")
    demonstrations: Literal["gold", "rough"] = Field(
        "gold", description="What is imitated: the answer, or a rough one."
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
        description="Optimizer and schedule.",
    )


class HealthConfig(StrictModel):
    """What ends an on-policy stage early, or raises an alarm in its log. Every decision is logged."""

    patience: Positive | None = Field(
        None,
        description="Stop when no domain's smoothed signal (reward, or divergence from the teacher) has improved for "
        "this many steps; never when absent.",
    )
    min_improvement: float = Field(0.01, gt=0, description="Relative change that counts as an improvement.")
    window: Positive = Field(10, description="Steps over which a signal is averaged.")
    min_entropy: Share = Field(
        0.1, description="Alarm when a domain's token entropy falls below this share of that of its first window."
    )
    max_length_growth: float = Field(
        2.0, gt=1, description="Alarm when a domain's mean length grows to this multiple of that of its first window."
    )
    max_compression: float = Field(
        5.0,
        gt=1,
        description="Alarm when a domain's completions shrink by more than this factor under zlib: they repeat "
        "themselves.",
    )
    max_mismatch: float = Field(
        0.1,
        gt=0,
        description="Alarm when sampler and trainer with the same weights differ by more than this in the "
        "log-probability of a sampled token, in nats on the mean of a domain.",
    )
    on_alarm: Literal["warn", "stop"] = Field("warn", description="Only log an alarm, or end the stage with it.")

    def key_fields(self) -> dict[str, Any]:
        """Only what can end a stage decides its result."""
        values = super().key_fields()
        idle = (
            [] if self.on_alarm == "stop" else ["min_entropy", "max_length_growth", "max_compression", "max_mismatch"]
        )
        if self.patience is None:
            idle += ["min_improvement", *(["window"] if self.on_alarm == "warn" else [])]
        return {name: value for name, value in values.items() if name not in idle}


class MonitorConfig(StrictModel):
    """Scores of the student while it trains: a learning curve for each domain."""

    every: Positive = Field(50, description="Steps between two measurements.")
    examples: Positive = Field(100, description="Held-out examples of each domain, greedy.")


class SamplerConfig(StrictModel):
    """Who draws the student's completions."""

    backend: Literal["transformers", "vllm", "vllm_server"] | None = Field(
        None,
        description="transformers or vLLM in the trainer's process, or vLLM servers (`resources.rollout_servers`); "
        "`resources.sampler` when absent.",
    )
    memory_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4,
        description="vllm: share of the device's memory for weights and cache while it samples; on a GPU it sleeps "
        "during the update.",
        json_schema_extra=NOT_IN_KEY,
    )
    ahead: bool = Field(
        False,
        description="vllm_server: sample the next batch while the current one is trained on, with weights one batch "
        "old; losses with an importance weight correct for it.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    max_staleness: int = Field(
        1,
        ge=0,
        description="Batches of updates the student may be ahead of the weights a completion was drawn with; an older "
        "group is dropped and counted.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    timeout_seconds: float = Field(
        600,
        gt=0,
        description="vllm_server: how long one prompt's completions, or a server's start, may take.",
        json_schema_extra=NOT_IN_KEY,
    )
    retries: int = Field(
        3,
        ge=0,
        description="vllm_server: new attempts at the completions a step still misses, when every server has failed.",
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
    """The one on-policy loop: sample with the student, judge the samples, update."""

    prompts_per_step: Positive = Field(16, description="Distinct prompts of one step, over all domains.")
    group_size: Positive = Field(8, description="Completions sampled for each prompt.")
    max_new_tokens: Positive = Field(64, description="Longest completion; a longer one is cut and has no EOS.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the loss uses the same.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus sampling threshold.")
    updates_per_batch: Positive = Field(1, description="Optimizer updates made on each batch of rollouts.")
    sampler: SamplerConfig = Field(
        default_factory=SamplerConfig,
        description="What draws the completions.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    loss_normalisation: Literal["token", "sequence", "domain"] = Field(
        "token",
        description="Mean over all tokens; the mean over sequences of each one's own mean; or the mean over domains "
        "of each one's token mean, so that a domain of long answers does not own the gradient.",
    )
    domain_shares: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="loss_normalisation domain: a domain's share of the loss, relative to 1.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    max_domain_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Budget: no domain has more than this share of the loss; what one is over goes to the others.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    health: HealthConfig = Field(
        default_factory=HealthConfig,
        description="Early stop and alarms.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    monitor: MonitorConfig | None = Field(
        None, description="Measure the student while it trains.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _shares_are_of_domains(self) -> Self:
        if self.domain_shares and self.loss_normalisation != "domain":
            raise ValueError("domain_shares belongs to loss_normalisation: domain")
        return self


class RLConfig(OnPolicyConfig):
    """GRPO family: group-normalised verifiable reward, no critic, asymmetric clip."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0, description="The ratio is clipped above at 1 + clip_high (DAPO).")
    normalise_by_std: bool = Field(True, description="Divide a group's advantages by its standard deviation.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4), description="Optimizer and schedule."
    )


class TopKConfig(StrictModel):
    """A divergence over K tokens of the vocabulary instead of all."""

    k: Positive = Field(32, description="Tokens taken from a model; as many as the vocabulary has is the exact form.")
    support: Literal["student", "teacher", "union", "intersection"] = Field(
        "teacher", description="Whose likeliest tokens."
    )
    remainder: Literal["renormalise", "correct", "tail"] = Field(
        "tail",
        description="What becomes of the others: both distributions renormalised over the support, the mass "
        "difference added (- S + T), or all others in one bucket.",
    )

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.k == 1 and self.remainder == "renormalise" and self.support != "union":
            raise ValueError("k: 1 renormalised is one token of probability 1 for every student; take a larger k")
        return self


class ObjectiveConfig(StrictModel):
    """What the student minimises on its samples against the routed teacher; a name alone stands for its defaults."""

    name: Literal["reverse_kl", "forward_kl", "jsd", "entropy_aware", "sampled_reverse_kl"] = Field(
        "reverse_kl",
        description="Exact full-vocabulary reverse KL, forward KL, generalised JSD, reverse KL plus forward KL where "
        "the teacher is unsure; or the sampled token's log-ratio as a clipped advantage.",
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
    entropy_threshold: float = Field(
        0.8,
        ge=0,
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
        "what updates of the same batch have moved counts by the token.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    importance_band: tuple[float, float] = Field((0.5, 2.0), description="The band of the ratio: [low, high].")
    outcome_weight: float = Field(0.0, ge=0, description="alpha: weight of the group-normalised outcome reward.")
    extrapolation: float = Field(
        1.0,
        ge=0,
        description="lambda: beyond 1 the target lies beyond the teacher, away from the start checkpoint (ExOPD); 1 is "
        "the teacher itself.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    reference_kl: float = Field(
        0.0,
        ge=0,
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
        description="Tokens whose logits exist at one time; as many as 64 MiB hold when absent.",
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
    group_size: Positive = Field(1, description="Completions sampled for each prompt.")
    prompts_per_step: Positive = Field(80, description="Distinct prompts of one step, spread over the domains.")
    domain_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Share of prompts of a domain, relative to 1."
    )
    teacher_weights: dict[str, dict[str, TeacherWeight]] = Field(
        default_factory=dict,
        description="domain -> teacher -> weight, where several teachers share a domain; their geometric mean teaches.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    on_policy_fraction: Share = Field(
        1.0,
        description="Share of prompts the student answers itself; the others bring completions made elsewhere.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    off_policy: Literal["teacher", "dataset"] = Field(
        "teacher",
        description="Whose completions the others bring: the routed teacher's own, or the domain's gold answers.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    teacher_backend: Literal["local", "vllm_server"] = Field(
        "local",
        description="Who scores: the trainer's own process, or vLLM servers (`resources.teacher_servers`), which tell "
        "of a teacher its likeliest tokens and the sampled one.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    max_resident: Positive = Field(
        8,
        description="Full teacher checkpoints held in memory at one time; of the others only the output heads, while a "
        "step needs them.",
        json_schema_extra=NOT_IN_KEY,
    )
    teacher_cache: Literal["device", "cpu"] = Field(
        "device",
        description="Where the teachers' hidden states wait for the updates of one rollout.",
        json_schema_extra=NOT_IN_KEY,
    )
    preflight_tolerance: float = Field(
        0.0,
        ge=0,
        description="Largest gap between two forwards of one model, in nats, that the preflight lets pass; 0 takes "
        "1e-3 in float32 and 0.25 in bfloat16.",
        json_schema_extra=NOT_IN_KEY,
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3), description="Optimizer and schedule."
    )

    def key_fields(self) -> dict[str, Any]:
        """Who would answer prompts decides nothing where the student answers all."""
        values = super().key_fields()
        if self.on_policy_fraction == 1.0:
            values.pop("off_policy", None)
        return values

    @model_validator(mode="after")
    def _servers_tell_enough(self) -> Self:
        if self.teacher_backend == "local":
            return self
        top_k = self.objective.top_k
        if self.objective.name != "sampled_reverse_kl" and (top_k is None or top_k.support != "teacher"):
            raise ValueError(
                f"teacher_backend: vllm_server tells the sampled token's log-probability and the teacher's likeliest "
                f"ones; objective {self.objective.name} needs more of the teacher. Take sampled_reverse_kl, or top_k "
                f"with support: teacher"
            )
        if top_k is not None and self.objective.extrapolation != 1.0:
            raise ValueError("teacher_backend: vllm_server extrapolates with sampled_reverse_kl only, not with top_k")
        if self.temperature != 1.0:
            raise ValueError("teacher_backend: vllm_server tells log-probabilities at temperature 1 only")
        if self.teacher_weights:
            raise ValueError("teacher_backend: vllm_server takes one teacher a domain")
        if self.on_policy_fraction < 1 and self.off_policy == "teacher":
            raise ValueError("teacher_backend: vllm_server only scores; off_policy: teacher needs local teachers")
        return self

    @model_validator(mode="after")
    def _reward_has_a_group(self) -> Self:
        if self.objective.outcome_weight > 0 and self.group_size < 2:
            raise ValueError("objective.outcome_weight needs a group_size of 2 or more, to compare rewards in")
        if self.on_policy_fraction < 1 and self.off_policy == "dataset" and self.group_size > 1:
            raise ValueError("off_policy: dataset has one completion of a prompt; it needs a group_size of 1")
        return self


class EvaluationConfig(StrictModel):
    """How one checkpoint is scored on one domain and split."""

    examples: Positive = Field(400, description="Held-out examples of each domain.")
    samples: int = Field(4, ge=0, description="Sampled completions of each example beside the greedy one.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampled completions.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus threshold of the sampled completions.")
    max_new_tokens: Positive = Field(64, description="Longest completion.")
    batch_size: Positive = Field(256, description="Sequences sampled together; decides which random numbers each gets.")
