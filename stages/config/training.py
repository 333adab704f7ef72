"""The stages' configs, as a run file contains them, with defaults. Free of torch. The configs of the on-policy stages
are in `stages.config.on_policy` and `stages.config.distill`.

A field marked `not_in_key` changes how a stage runs, never its result, and is left out of the content key. A field at
its default is left out too, so a new option makes no finished stage run again. A changed default raises the stage's
version in `stages.config.kinds`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

# Bounds far above any real use: a larger value is a typing error, and would fill memory or never end.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Steps = Annotated[int, Field(gt=0, le=10**7)]
Rows = Annotated[int, Field(gt=0, le=2**20)]
StepTokens = Annotated[int, Field(gt=0, le=2**24)]
NewTokens = Annotated[int, Field(gt=0, le=2**20)]
Temperature = Annotated[float, Field(ge=1e-3, le=100)]
Weight = Annotated[float, Field(ge=0, le=1e3)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}
StopList = tuple[Annotated[str, Field(min_length=1, max_length=100)], ...]
STOP = "Texts that end a completion, besides the model's end tokens: a few-shot prompt's next question; not scored."
# Float32 factors rounded to 10 bits are no longer the same result, so the choice is part of the content key.
Float32Matmul = Literal["highest", "high"]
FLOAT32_MATMUL = "Products of float32 on a GPU: highest is exact, high rounds their factors to TF32."


def each_once(value: Any) -> Any:
    """Check that no entry of a list is repeated; a value of another type is left to the field's type."""
    if isinstance(value, list) and (twice := next((x for at, x in enumerate(value) if x in value[:at]), None)):
        raise ValueError(f"'{twice}' is named twice")
    return value


def _named_once(value: Any) -> Any:
    """Check that a list has names, each of them once; a value of another type is left to the field's type."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("the list is empty; name one or more, or leave the key out")
    each_once(value)
    if odd := next((name for name in value if not isinstance(name, str)), None):
        raise ValueError(f"{odd!r:.60} is no name")
    return value


def _all_or_names(value: Any) -> Any:
    if value != "all" and not isinstance(value, list):
        raise ValueError(f"write `all`, or a list of names (given: {value!r:.60})")
    return _named_once(value)


# The validators demand more than the types; a JSON schema gets it from here.
_SomeNames = Annotated[list[str], Field(min_length=1)]
Names = Annotated[list[str], BeforeValidator(_named_once, json_schema_input_type=_SomeNames)]
AllOrNames = Annotated[
    Literal["all"] | list[str],
    BeforeValidator(_all_or_names, json_schema_input_type=Literal["all"] | _SomeNames),
]


class StrictModel(BaseModel):
    """A config whose unknown keys are errors and whose values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's `yes` and `on` as numbers, since Python's bool is an int."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise ValueError(f"a number is expected, not {str(value).lower()}")
        return value

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result and differ from their defaults, as JSON-serialisable values."""
        dumped, values = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            value = _key_value(getattr(self, name))
            default = field.get_default(call_default_factory=True, validated_data={})
            if not extra.get("not_in_key") and (field.is_required() or value != _key_value(default)):
                values[name] = value if isinstance(value, dict) else dumped[name]
        return values


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation, without those inside containers."""
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    arguments = get_args(annotation)
    if not arguments or isinstance(getattr(annotation, "__origin__", None), type):
        return {annotation}
    return set().union(*(_kinds(argument) for argument in arguments))


def _key_value(value: Any) -> Any:
    return value.key_fields() if isinstance(value, StrictModel) else value


class OptimizerConfig(StrictModel):
    """AdamW with a learning-rate schedule. Keys that are left out have the stage's own defaults, if it has any."""

    learning_rate: float = Field(1e-3, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, le=10**7, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.0, ge=0, le=100, description="Decoupled weight decay.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW's beta1 and beta2.")
    max_grad_norm: float = Field(
        1.0, gt=0, allow_inf_nan=True, description="Gradients are clipped to this global norm; .inf does not clip."
    )
    states: Literal["float32", "8bit"] = Field(
        "float32",
        description="AdamW's two moments of a trained weight: float32 takes 8 bytes, 8bit 2 bytes (AdamW8bit of "
        "bitsandbytes, which `make setup-bitsandbytes` installs). Embeddings, and tensors of fewer than 4096 values, "
        "keep float32.",
    )
    paged: bool = Field(
        False,
        description="With states: 8bit on a GPU, pages of the moments move to the host's memory where the GPU's is "
        "full (PagedAdamW8bit).",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="after")
    def _pages_what_can_be_paged(self) -> Self:
        if self.paged and self.states != "8bit":
            raise ValueError(f"paged: true pages moments in 8bit; states is {self.states}")
        return self

    @model_validator(mode="after")
    def _decays_less_than_all(self) -> Self:
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay: {self.weight_decay:g} at a learning rate of {self.learning_rate:g} removes the whole "
                f"weight in each step"
            )
        return self


class LoraConfig(StrictModel):
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: int = Field(16, gt=0, le=2**14, description="Rank of the adapters.")
    alpha: int = Field(32, gt=0, le=2**20, description="Scale numerator: the update is scaled by alpha / rank.")
    dropout: Beta = Field(0.0, description="Dropout on the adapters' input.")
    target_modules: str | Names = Field("all-linear", description="Modules that get an adapter.")

    @field_validator("target_modules")
    @classmethod
    def _name_modules(cls, value: str | list[str]) -> str | list[str]:
        if not all([value] if isinstance(value, str) else value):
            raise ValueError("is empty; name modules, or write all-linear")
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r:.60} is no regular expression: {error}") from None
        return value


class TrainConfig(StrictModel):
    """The fields that all training stages share.

    Attributes:
        own_dropout: Whether the dropout of the model's own config is active in updates.
    """

    own_dropout: ClassVar[bool] = True

    max_steps: Steps = Field(100, description="Optimizer steps (SFT) or rollout steps (on-policy).")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer and schedule.")
    lora: LoraConfig | None = Field(None, description="Train adapters; full fine-tuning when absent.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Number type of products, in updates, rollouts and teachers alike. In bfloat16 sums, logits, "
        "losses and trained weights stay float32, and frozen weights of linear layers and experts are kept in "
        "bfloat16.",
    )
    float32_matmul: Float32Matmul = Field("highest", description=FLOAT32_MATMUL)
    micro_batch_tokens: Positive = Field(
        16384,
        description="Padded tokens of one forward and backward pass; larger batches accumulate gradients. It changes "
        "the order of sums, and with dropout what is drawn. A stage that runs out of memory continues with half of it.",
        json_schema_extra=NOT_IN_KEY,
    )
    examples: Positive = Field(
        3000, description="Distinct training examples of each domain; all if its data have fewer."
    )
    max_prompt_tokens: Positive | None = Field(
        None,
        description="Longest prompt, in tokens; the model's context less max_new_tokens (SFT: less the answer) when "
        "absent.",
    )
    longer_prompts: Literal["refuse", "drop", "truncate"] = Field(
        "refuse",
        description="Treatment of longer prompts: an error that counts them; left out; or their longest message cut at "
        "its beginning. The journal counts them.",
    )
    save_every: Positive = Field(25, description="Steps between saved states.", json_schema_extra=NOT_IN_KEY)
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="On several devices: a full copy on each (DDP), or weights, gradients and optimizer state sharded "
        "over them (FSDP2).",
        json_schema_extra=NOT_IN_KEY,
    )
    cpu_offload: bool = Field(
        False,
        description="With sharding: fsdp, shards of weights, gradients and optimizer state are kept in the host's "
        "memory, where AdamW runs; a device holds the layers in use.",
        json_schema_extra=NOT_IN_KEY,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, about a third more time.",
        json_schema_extra=NOT_IN_KEY,
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _complete_with_defaults(cls, value: Any) -> Any:
        """Without this, `optimizer: {states: 8bit}` would train at the rate of `OptimizerConfig`."""
        if not isinstance(value, Mapping):
            return value
        own: OptimizerConfig = cls.model_fields["optimizer"].get_default(call_default_factory=True, validated_data={})
        return own.model_dump(exclude_unset=True) | dict(value)

    @model_validator(mode="after")
    def _can_be_sharded_so(self) -> Self:
        sharded = self.sharding == "fsdp"
        if sharded and self.optimizer.states == "8bit":
            raise ValueError(
                "optimizer.states: 8bit does not work with sharding: fsdp, since bitsandbytes takes whole tensors; "
                "cpu_offload: true takes the shards and float32 states off the devices"
            )
        if self.cpu_offload and not sharded:
            raise ValueError(
                "cpu_offload: true goes with sharding: fsdp; on one device optimizer: {states: 8bit, paged: true} "
                "moves moments to the host"
            )
        return self


class TinyModelConfig(StrictModel):
    """A small Qwen3 made from scratch."""

    hidden_size: int = Field(128, gt=0, le=2**15, description="Width.")
    layers: int = Field(3, gt=0, le=1000, description="Decoder layers.")
    heads: int = Field(4, gt=0, le=1024, description="Attention heads (and key-value heads).")
    intermediate_size: int = Field(256, gt=0, le=2**18, description="Width of the feed-forward layer.")
    max_length: int = Field(512, ge=8, le=2**22, description="Longest sequence.")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size: {self.hidden_size} is no multiple of 2 * heads ({2 * self.heads}); a head needs an even "
                f"width, because rotary positions rotate pairs"
            )
        return self


class PretrainConfig(TrainConfig):
    """Pretraining of a tiny model from scratch on rough demonstrations of the domains."""

    model: TinyModelConfig = Field(default_factory=TinyModelConfig, description="The architecture.")
    domains: AllOrNames = Field("all", description="Domains in the corpus.")
    max_steps: Steps = Field(450, description="Optimizer steps.")
    batch_tokens: StepTokens = Field(2048, description="Tokens of one step.")
    lora: None = Field(None, description="A model from scratch has no base for adapters.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=6e-3, schedule="cosine", warmup_steps=20),
        description="Optimizer and schedule.",
    )


class ConflictMaskConfig(StrictModel):
    """Demonstrated tokens that conflict with the trained model's confident predictions (EAFT, arXiv:2601.02151)."""

    probability: Share = Field(0.1, description="A conflicting token has less than this probability.")
    entropy: float = Field(0.5, gt=0, le=100, description="The model is sure where its entropy is below this, in nats.")


class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations; the loss is on completion tokens only."""

    batch_size: Rows = Field(64, description="Examples of one step.")
    demonstrations: Literal["gold", "rough"] = Field(
        "gold", description="The demonstrations that are imitated: gold answers, or rough ones."
    )
    mask_conflicts: ConflictMaskConfig | None = Field(
        None,
        description="Leave tokens out of the loss that are improbable under the model in training while it is "
        "confident of others; they drive forgetting. The loss is the mean over the remaining tokens. No token is left "
        "out when absent.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
        description="Optimizer and schedule.",
    )
