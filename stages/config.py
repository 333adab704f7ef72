"""The stages' configs: what a run file may say about each stage, with defaults. Free of torch.

A field marked `not_in_key` changes how a stage runs, never its result, and stays out of the content key.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}


class StrictModel(BaseModel):
    """A config whose unknown keys are errors and whose values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON-serialisable values."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("not_in_key"):
                del values[name]
            elif isinstance(nested := getattr(self, name), StrictModel):
                values[name] = nested.key_fields()
        return values


class OptimizerConfig(StrictModel):
    """AdamW with a learning-rate schedule."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's beta1 and beta2.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")


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


class OnPolicyConfig(TrainConfig):
    """The one on-policy loop: sample with the student, judge the samples, update."""

    prompts_per_step: Positive = Field(16, description="Distinct prompts of one step, over all domains.")
    group_size: Positive = Field(8, description="Completions sampled for each prompt.")
    max_new_tokens: Positive = Field(64, description="Longest completion; a longer one is cut and has no EOS.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the loss uses the same.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus sampling threshold.")
    updates_per_batch: Positive = Field(1, description="Optimizer updates made on each batch of rollouts.")
    loss_normalisation: Literal["token", "sequence"] = Field(
        "token", description="Mean over all tokens, or the mean over sequences of each one's own mean."
    )


class RLConfig(OnPolicyConfig):
    """GRPO family: group-normalised verifiable reward, no critic, asymmetric clip."""

    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0, description="The ratio is clipped above at 1 + clip_high (DAPO).")
    normalise_by_std: bool = Field(True, description="Divide a group's advantages by its standard deviation.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4), description="Optimizer and schedule."
    )


class ObjectiveConfig(StrictModel):
    """What the student minimises on its own samples against the routed teacher."""

    name: Literal["reverse_kl", "sampled_reverse_kl"] = Field(
        "reverse_kl",
        description="Exact full-vocabulary reverse KL, or the sampled token's log-ratio as a clipped advantage.",
    )
    advantage_clip: float = Field(5.0, gt=0, description="A_max: the sampled log-ratio is clipped to ±A_max.")
    importance_band: tuple[float, float] = Field(
        (0.5, 2.0),
        description="Tokens whose policy/sampler ratio is outside get weight 0 (MiMo: dropped, not clipped).",
    )
    outcome_weight: float = Field(0.0, ge=0, description="alpha: weight of the group-normalised outcome reward.")
    chunk_tokens: Positive = Field(
        1024, description="Tokens whose logits exist at one time in an exact divergence.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _band_is_ordered(self) -> "ObjectiveConfig":
        low, high = self.importance_band
        if not 0 <= low < 1 < high:
            raise ValueError("importance_band must be [low, high] with 0 <= low < 1 < high")
        return self


class DistillConfig(OnPolicyConfig):
    """Multi-teacher on-policy distillation: the loop with the routed teacher's signal."""

    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="The teacher's signal.")
    group_size: Positive = Field(1, description="Completions sampled for each prompt.")
    prompts_per_step: Positive = Field(80, description="Distinct prompts of one step, spread over the domains.")
    domain_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Share of prompts of a domain, relative to 1."
    )
    max_resident: Positive = Field(
        8, description="Full teacher checkpoints held in memory at one time.", json_schema_extra=NOT_IN_KEY
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3), description="Optimizer and schedule."
    )

    @model_validator(mode="after")
    def _reward_has_a_group(self) -> "DistillConfig":
        if self.objective.outcome_weight > 0 and self.group_size < 2:
            raise ValueError("objective.outcome_weight needs a group_size of 2 or more, to compare rewards in")
        return self


class EvaluationConfig(StrictModel):
    """How one checkpoint is scored on one domain and split."""

    examples: Positive = Field(400, description="Held-out examples of each domain.")
    samples: int = Field(4, ge=0, description="Sampled completions of each example beside the greedy one.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampled completions.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus threshold of the sampled completions.")
    max_new_tokens: Positive = Field(64, description="Longest completion.")
    batch_size: Positive = Field(256, description="Sequences sampled together; decides which random numbers each gets.")
