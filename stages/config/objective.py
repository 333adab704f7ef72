"""The merge's objectives: a union by `type`, each with its own options only. Free of torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from stages.config.training import NOT_IN_KEY, Positive, StrictModel, Weight

IMITATION, SAMPLED, PYTHON = "imitation", "sampled_reverse_kl", "python"


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


class Objective(StrictModel):
    """Options of every objective."""

    reference_kl: Weight = Field(
        0.0,
        description="Weight of the reverse KL against the start checkpoint, against length inflation (about 0.01).",
    )
    golden_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the loss that is cross-entropy on the domains' gold answers (about 0.1)."
    )
    chunk_tokens: Positive | None = Field(
        None,
        description="Tokens whose logits exist at the same time; as many as fit into 64 MiB when absent.",
        json_schema_extra=NOT_IN_KEY,
    )

    @property
    def extrapolates(self) -> bool:
        """Whether the target lies beyond the teacher."""
        return False

    @property
    def rewarded(self) -> bool:
        """Whether the outcome reward is part of the loss."""
        return False

    @property
    def likeliest(self) -> TopKConfig | None:
        """The tokens that the divergence is restricted to; None for the whole vocabulary."""
        return None


class TargetObjective(Objective):
    """Options of the objectives that have the teacher as a target."""

    extrapolation: Weight = Field(
        1.0,
        description="lambda: beyond 1 the target lies beyond the teacher, away from the start checkpoint (ExOPD); 1 is "
        "the teacher itself.",
    )
    outcome_weight: Weight = Field(0.0, description="alpha: weight of the group-normalised outcome reward.")
    importance: Literal["drop", "truncate", "mask"] = Field(
        "drop",
        description="Outside the band the policy/sampler ratio weighs 0 (MiMo), is cut to the upper end (TIS), or "
        "masks the token where trainer and sampler disagree before any update (IcePop).",
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token",
        description="Whether trainer and sampler are compared by the token or by the geometric mean over its sequence; "
        "the change by updates on the same batch always counts by the token.",
    )
    importance_band: tuple[float, float] = Field((0.5, 2.0), description="The band of the ratio: [low, high].")

    @field_validator("importance_band")
    @classmethod
    def _holds_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low < 1 < high:
            raise ValueError("must be [low, high] with 0 <= low < 1 < high")
        return value

    @property
    def extrapolates(self) -> bool:
        """Whether the target lies beyond the teacher."""
        return self.extrapolation != 1.0

    @property
    def rewarded(self) -> bool:
        """Whether the outcome reward is part of the loss."""
        return self.outcome_weight > 0


class Divergence(TargetObjective):
    """Options of the divergences, which weigh every token by 1; the importance ratio is that of the reward's part."""

    @model_validator(mode="after")
    def _corrects_a_reward(self) -> Self:
        for option in ("importance", "importance_level", "importance_band"):
            if not self.rewarded and getattr(self, option) != type(self).model_fields[option].default:
                kind = self.model_dump()["type"]
                raise ValueError(
                    f"{option} belongs to {SAMPLED} or an outcome_weight; the exact {kind} weighs every token by 1"
                )
        return self


class Restrictable(Divergence):
    """Options of the divergences with a top-k form."""

    top_k: TopKConfig | None = Field(None, description="Restrict the divergence to K tokens.")

    @property
    def likeliest(self) -> TopKConfig | None:
        """The tokens that the divergence is restricted to; None for the whole vocabulary."""
        return self.top_k


class ReverseKL(Restrictable):
    """KL(student || teacher), exact over the vocabulary or over K tokens."""

    type: Literal["reverse_kl"] = Field(description="The name of this type.")


class ForwardKL(Restrictable):
    """KL(teacher || student), exact over the vocabulary or over K tokens."""

    type: Literal["forward_kl"] = Field(description="The name of this type.")


class JSD(Restrictable):
    """The generalised Jensen-Shannon divergence (GKD), exact over the vocabulary or over K tokens."""

    type: Literal["jsd"] = Field(description="The name of this type.")
    beta: float = Field(
        0.5, gt=0, lt=1, description="Weight of KL(teacher || mixture), and the teacher's share of the mixture."
    )


class EntropyAware(Divergence):
    """The exact reverse KL, plus the forward KL where the teacher is unsure."""

    type: Literal["entropy_aware"] = Field(description="The name of this type.")
    entropy_threshold: Weight = Field(0.8, description="The teacher's entropy in nats above which forward KL is added.")


class SampledReverseKL(TargetObjective):
    """The sampled token's log-ratio as a clipped advantage, weighed by the importance ratio (MiMo)."""

    type: Literal["sampled_reverse_kl"] = Field(description="The name of this type.")
    advantage_clip: float = Field(
        5.0, gt=0, allow_inf_nan=True, description="A_max: the sampled log-ratio is clipped to ±A_max."
    )


class Imitation(Objective):
    """Cross-entropy of completions that the student did not write (SeqKD, with on_policy_fraction 0)."""

    type: Literal["imitation"] = Field(description="The name of this type.")


class PythonObjective(Divergence):
    """A function of your own Python file; the file's content is part of the key."""

    type: Literal["python"] = Field(description="The name of this type.")
    path: str = Field(description="FILE.py:FUNCTION, by the file's path from the run file's folder.")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="The function's keyword arguments.")

    @field_validator("path")
    @classmethod
    def _names_a_function(cls, value: str) -> str:
        file, _, function = value.rpartition(":")
        if not file.endswith(".py") or not function.isidentifier():
            raise ValueError(f"'{value:.60}' is not FILE.py:FUNCTION")
        return value

    @property
    def file(self) -> str:
        """The path of the Python file."""
        return self.path.rpartition(":")[0]

    @property
    def function(self) -> str:
        """The name of the function."""
        return self.path.rpartition(":")[2]

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the result: the function's name in place of its path; the plan adds the content."""
        return super().key_fields() | {"path": self.function}


def _of_a_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _type_of(value: Any) -> Any:
    """The type of an objective's mapping or model; None if it is absent."""
    found = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return found if found is None else str(found)


# A discriminator by the field's name would allow no validator of all fields, as `StrictModel` has.
ObjectiveConfig = Annotated[
    Annotated[ReverseKL, Tag("reverse_kl")]
    | Annotated[ForwardKL, Tag("forward_kl")]
    | Annotated[JSD, Tag("jsd")]
    | Annotated[EntropyAware, Tag("entropy_aware")]
    | Annotated[SampledReverseKL, Tag(SAMPLED)]
    | Annotated[Imitation, Tag(IMITATION)]
    | Annotated[PythonObjective, Tag(PYTHON)],
    Discriminator(_type_of),
    BeforeValidator(_of_a_name),
]
