"""The stages' configs: what a run file may say about each stage, with defaults. Free of torch. Those of the on-policy
stages stand in `stages.on_policy.config` and `.distill_config`.

A field marked `not_in_key` changes how a stage runs, never its result, and stays out of the content key. One marked
`neutral_default` was added after checkpoints had been made without it: at its default it means what its absence meant,
and stays out of the key, so that a new option makes no finished stage run again.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}
StopList = tuple[Annotated[str, Field(min_length=1, max_length=100)], ...]
STOP = "Texts that end a completion beside the model's own end, such as a few-shot prompt's next question; not scored."
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
    """What every training stage shares.

    Attributes:
        own_dropout: Whether the dropout that a model's config brings is on in its updates.
    """

    own_dropout: ClassVar[bool] = True

    max_steps: Positive = Field(100, description="Optimizer steps (SFT) or rollout steps (on-policy).")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer and schedule.")
    lora: LoraConfig | None = Field(None, description="Train adapters; full fine-tuning when absent.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Autocast type; weights stay float32.")
    micro_batch_tokens: Positive = Field(
        16384, description="Padded tokens of one forward and backward pass; larger batches accumulate gradients."
    )
    examples: Positive = Field(
        3000, description="Distinct training examples of each domain; all where its data have fewer."
    )
    max_prompt_tokens: Positive | None = Field(
        None,
        description="Longest prompt, in tokens; what max_new_tokens (SFT: the answer) leaves of the model's context "
        "when absent.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    longer_prompts: Literal["refuse", "drop", "truncate"] = Field(
        "refuse",
        description="What becomes of longer prompts: an error that counts them; left out; or their longest message cut "
        "at its beginning. The journal counts them.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
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


class ConflictMaskConfig(StrictModel):
    """Which demonstrated tokens conflict with what the model in training is sure of (EAFT, arXiv:2601.02151)."""

    probability: Share = Field(0.1, description="A conflicting token has less than this probability.")
    entropy: float = Field(0.5, gt=0, description="The model is sure where its entropy is below this, in nats.")


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations; the loss is on completion tokens only."""

    batch_size: Positive = Field(64, description="Examples of one step.")
    demonstrations: Literal["gold", "rough"] = Field(
        "gold", description="What is imitated: the answer, or a rough one."
    )
    mask_conflicts: ConflictMaskConfig | None = Field(
        None,
        description="Leave tokens out of the loss that the model in training finds improbable while it is sure of "
        "others; they drive forgetting. The loss is the mean over what is left. No token is left out when absent.",
        json_schema_extra=NEUTRAL_DEFAULT,
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
        description="Optimizer and schedule.",
    )


class EvaluationConfig(StrictModel):
    """How one checkpoint is scored on one domain and split."""

    examples: Positive = Field(400, description="Held-out examples of each domain; all where its data have fewer.")
    samples: int = Field(4, ge=0, description="Sampled completions of each example beside the greedy one.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the sampled completions.")
    top_p: float = Field(1.0, gt=0, le=1.0, description="Nucleus threshold of the sampled completions.")
    stop: StopList = Field((), description=STOP, json_schema_extra=NEUTRAL_DEFAULT)
    max_new_tokens: Positive = Field(64, description="Longest completion.")
    batch_size: Positive = Field(256, description="Sequences sampled together; decides which random numbers each gets.")
