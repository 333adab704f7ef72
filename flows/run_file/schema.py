"""The run file's schema: one base, a cold start, experts, a merge, and how they are measured. Free of torch.

`flows.run_file.load` reads one.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, create_model, field_validator, model_validator

from base.errors import UserError
from evals.config.claims import HypothesisConfig
from experts.loading import KINDS
from flows.run_file.evaluation import EvaluateConfig, GateConfig
from flows.run_file.notify import NotifyConfig
from flows.run_file.resources import ResourcesConfig
from stages.config.command import CommandConfig
from stages.config.distill import DistillSettings, TeacherWeight
from stages.config.kinds import STAGES
from stages.config.on_policy import Ratio
from stages.config.training import AllOrNames, Names, PretrainConfig, SFTConfig, StrictModel, TrainConfig
from stages.rows.rendering import OWN_ARGUMENTS

COLD_START = "cold_start"
BASE = "base"
STUDENT = "student"
CHAMPION = "champion"
BASELINES = "baselines/"
VARIANTS = "variants/"
MOST_ROUNDS = 100
# numpy accepts no larger seeds.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class BaseConfig(StrictModel):
    """The run's base: exactly one of a fresh pretraining, a checkpoint, or a GGUF file."""

    pretrain: PretrainConfig | None = Field(None, description="Pretrain a tiny model from scratch.")
    checkpoint: str | None = Field(None, description="A Hugging Face id or a local directory.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id.")
    gguf: str | None = Field(
        None, min_length=1, description="A GGUF file: a path, or package://PACKAGE/FILE for an installed one."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(source is not None for source in (self.pretrain, self.checkpoint, self.gguf)) != 1:
            raise ValueError("give exactly one of pretrain, checkpoint, gguf")
        if self.revision and not self.checkpoint:
            raise ValueError("revision goes with checkpoint")
        return self


class DomainConfig(StrictModel):
    """One skill: a kind of domain and its options."""

    kind: str = Field(description=f"One of {', '.join(KINDS)}; or your own Python file.")
    options: dict[str, Any] = Field(default_factory=dict, description="The kind's own options.")


class ColdStartSFT(SFTConfig):
    """The cold start: SFT on a few demonstrations of many domains."""

    domains: AllOrNames = Field("all", description="Domains demonstrated.")
    demonstrations: Literal["gold", "rough"] = Field(
        "rough", description="What is imitated: the answer, or a rough one with the domain's usual mistakes."
    )


class ColdStartConfig(StrictModel):
    """The common start of all experts and of the merge."""

    sft: ColdStartSFT = Field(description="Supervised fine-tuning on demonstrations.")


# A key for each stage that trains experts, from the table of stages.
_METHODS: Any = {
    kind.name: (kind.config | None, Field(None, description=kind.expert)) for kind in STAGES.values() if kind.expert
}
_Methods: Any = create_model("_Methods", __base__=StrictModel, **_METHODS)


class TrainMethod(_Methods):
    """How an expert is trained: exactly one of its methods."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError(f"give exactly one of {', '.join(type(self).model_fields)}")
        return self

    @property
    def chosen(self) -> tuple[str, TrainConfig | CommandConfig]:
        """The method's name and its config."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        return next((name, method) for name, method in named.items() if method is not None)


class ExpertConfig(StrictModel):
    """An expert: its domain, and its training or checkpoint."""

    domain: str = Field(description="The domain it is trained in.")
    train: TrainMethod | None = Field(None, description="How it is trained: sft, rl, rft or command.")
    checkpoint: str | None = Field(
        None, min_length=1, description="An expert trained elsewhere: a Hugging Face id or a directory."
    )
    start_from: str | None = Field(None, description="cold_start, base or champion; the cold start when there is one.")

    @model_validator(mode="after")
    def _trained_or_given(self) -> Self:
        if (self.train is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of train, checkpoint")
        return self


class AnchorConfig(StrictModel):
    """The start checkpoint teaches its own general prompts, so that the student does not forget them."""

    domains: Names = Field(description="Domains whose teacher is the checkpoint the merge starts from.")
    weight: Ratio = Field(1.0, description="Share of prompts of an anchor domain, relative to an expert's domain.")


def _as_weights(value: Any) -> Any:
    """One teacher's bare name as a mapping; an empty mapping is refused."""
    if isinstance(value, str):
        return {value: 1.0}
    if not isinstance(value, dict) or not value:
        raise ValueError("name an expert, or several with their weights: {ONE: 0.7, OTHER: 0.3}")
    return value


Teachers = Annotated[
    dict[str, TeacherWeight],
    BeforeValidator(_as_weights, json_schema_input_type=str | Annotated[dict[str, TeacherWeight], Field(min_length=1)]),
]


Settings = dict[str, Any] | None


class BaselinesConfig(StrictModel):
    """Other ways to make one student of the same experts, each with its own settings; a list of names takes the
    defaults."""

    weight_average: Settings = Field(None, description="Mean of the experts' weights.")
    task_arithmetic: Settings = Field(None, description="The start plus the scaled sum of the experts' task vectors.")
    ties: Settings = Field(None, description="TIES: task vectors trimmed, signs elected, disjoint mean.")
    dare_linear: Settings = Field(None, description="DARE: task vectors dropped at random and rescaled, then summed.")
    dare_ties: Settings = Field(None, description="DARE's drop, then TIES' election of signs.")
    seqkd: Settings = Field(None, description="SFT on the teachers' own completions of the merge's prompts.")
    mix_sft: Settings = Field(None, description="SFT on demonstrations of all domains practised.")
    mix_rl: Settings = Field(None, description="RL on all domains practised, as the run's first RL expert is trained.")

    @model_validator(mode="before")
    @classmethod
    def _takes_names(cls, value: Any) -> Any:
        return {str(name): {} for name in value} if isinstance(value, list) else value

    @property
    def named(self) -> list[str]:
        """The baselines in the run file, in the order of the fields."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]


class MergeConfig(DistillSettings):
    """The student: many teachers, one on-policy loop."""

    method: Literal["mopd", "command"] = Field(
        "mopd", description="Multi-teacher on-policy distillation; or `command`: a program of your own merges."
    )
    command: CommandConfig | None = Field(
        None, description="method: command: the program. It finds the teachers of each domain in the file `{teachers}`."
    )
    start_from: str | None = Field(
        None,
        description="cold_start, base, an expert, or champion (the run's, pinned in its lock file: an incremental "
        "merge); the cold start when there is one.",
    )
    domains: Names | None = Field(None, description="Training domains; those with an expert when absent.")
    teachers: dict[str, Teachers] | None = Field(
        None,
        min_length=1,
        description="domain -> expert, or a mapping of several experts to their weights, of which only the ratio "
        "matters; by default the domain's own expert.",
    )
    fallback_teacher: str | None = Field(
        None, description="Expert, cold_start, base or champion for domains without a teacher."
    )
    anchor: AnchorConfig | None = Field(None, description="Domains kept by the start checkpoint itself.")
    rounds: int = Field(
        1,
        gt=0,
        le=MOST_ROUNDS,
        description="Co-evolution: the number of times that experts are trained and merged. Each round's experts "
        "(and its merge, unless start_from is set) start from the previous student.",
    )
    baselines: BaselinesConfig = Field(
        default_factory=BaselinesConfig, description="Other merges of the same experts, for comparison."
    )
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="The same merge with other settings, as additional students: NAME -> the keys that differ.",
    )

    @model_validator(mode="after")
    def _has_its_program(self) -> Self:
        if (self.method == "command") != (self.command is not None):
            raise ValueError("a merge by a program has both method: command and the program in command")
        return self


class RunConfig(StrictModel):
    """A whole run: where it starts, what it trains, and how it measures the result."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100, description="Name of the run, its lock and student."
    )
    seeds: list[Seed] = Field(
        default_factory=lambda: [0], min_length=1, max_length=100, description="The graph runs once per seed."
    )
    base: BaseConfig = Field(description="The checkpoint that everything starts from.")
    domains: dict[str, DomainConfig] = Field(min_length=1, description="The domains to learn and to measure.")
    cold_start: ColdStartConfig | None = Field(None, description="The common start of the experts.")
    experts: dict[str, ExpertConfig] = Field(default_factory=dict, description="The experts, by name.")
    merge: MergeConfig | None = Field(None, description="The merge that makes the student.")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="The measurements.")
    gate: GateConfig = Field(default_factory=GateConfig, description="The requirements for a promotion.")
    hypotheses: dict[str, HypothesisConfig] = Field(
        default_factory=dict, description="Hypotheses that the run tests, fixed before the measurement."
    )
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="Devices, servers and limits.")
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Arguments for imported checkpoints' chat templates wherever prompts are rendered, such as "
        "{enable_thinking: false}.",
    )
    remote_code: bool = Field(
        False, description="Run the Python code of imported checkpoints. Read it first: it may do anything."
    )
    notify: NotifyConfig | None = Field(None, description="A webhook to notify of failures and promotions.")

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, value: list[int]) -> list[int]:
        if twice := [seed for at, seed in enumerate(value) if seed in value[:at]]:
            raise ValueError(f"{twice[0]} is named twice, and would count as two seeds")
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_messages_alone(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(value.keys() & OWN_ARGUMENTS):
            raise ValueError(f"{taken[0]} is set by the stages; only variables of the template itself are allowed here")
        return value

    def domain_names(self, choice: Literal["all"] | list[str]) -> list[str]:
        """Resolve `all` or a list to domain names."""
        return list(self.domains) if choice == "all" else list(choice)

    def default_start(self) -> str:
        """The default start of experts and merge."""
        return COLD_START if self.cold_start else BASE

    def practised(self) -> list[str]:
        """The domains the student trains on: those with teachers, and the anchors."""
        merge = self.merge
        if merge is None:
            return []
        return list(dict.fromkeys([*self._taught_domains(merge), *(merge.anchor.domains if merge.anchor else [])]))

    def teachers(self) -> dict[str, dict[str, float]]:
        """Route every domain the student trains on to its teachers: experts' names, `cold_start` or `base`.

        Returns:
            domain -> teacher -> weight; the weights of a domain sum to 1.

        Raises:
            UserError: a domain has no teacher, or several experts could teach it.
        """
        merge = self.merge
        if merge is None:
            return {}
        routes = {domain: self._routed(merge, domain) for domain in self._taught_domains(merge)}
        for domain in merge.anchor.domains if merge.anchor else []:
            if taken := routes.get(domain):
                raise UserError(f"merge.anchor.domains: '{domain}' already has the teacher '{', '.join(taken)}'")
            routes[domain] = {merge.start_from or self.default_start(): 1.0}
        if not routes:
            raise UserError("merge: there is no teacher; add experts, merge.teachers or merge.anchor")
        return {
            domain: {name: weight / sum(weights.values()) for name, weight in weights.items()}
            for domain, weights in routes.items()
        }

    def _taught_domains(self, merge: MergeConfig) -> list[str]:
        """`merge.domains`; by default those with a teacher, and without settings of teachers those of the experts."""
        if merge.domains:
            return merge.domains
        own = [expert.domain for expert in self.experts.values()]
        return list(dict.fromkeys(own if merge.teachers is None else merge.teachers))

    def _routed(self, merge: MergeConfig, domain: str) -> dict[str, float]:
        """The teachers of a domain with their weights; none if the anchor teaches it."""
        if merge.teachers and domain in merge.teachers:
            return merge.teachers[domain]
        own = [name for name, expert in self.experts.items() if expert.domain == domain]
        if domain in own or len(own) == 1:
            return {domain if domain in own else own[0]: 1.0}
        if own:
            raise UserError(
                f"merge.teachers: domain '{domain}' has {len(own)} experts ({', '.join(own)}); name one, or several "
                f"with their weights: {{{domain}: {{{', '.join(f'{name}: 1.0' for name in own)}}}}}"
            )
        if merge.fallback_teacher:
            return {merge.fallback_teacher: 1.0}
        if merge.anchor is None or domain not in merge.anchor.domains:
            raise UserError(
                f"merge.domains: domain '{domain}' has no teacher; route it in merge.teachers, "
                f"add it to merge.anchor.domains, or set merge.fallback_teacher"
            )
        return {}
