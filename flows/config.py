"""The run file: one base, a cold start, experts, a merge, and how they are measured. Free of torch.

`load_run_file` reads YAML, applies dotted overrides, validates, and says every mistake in one message.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from experts.domain import KINDS
from experts.errors import UserError, nearest
from stages.config import (
    DistillConfig,
    EvaluationConfig,
    PretrainConfig,
    RLConfig,
    SFTConfig,
    Share,
    StrictModel,
)

COLD_START = "cold_start"
BASE = "base"
STUDENT = "student"


class BaseConfig(StrictModel):
    """Where the run starts: exactly one of a fresh pretraining, a checkpoint, or a GGUF file."""

    pretrain: PretrainConfig | None = Field(None, description="Pretrain a tiny model from scratch.")
    checkpoint: str | None = Field(None, description="A Hugging Face id or a local directory.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id.")
    gguf: str | None = Field(None, description="A GGUF file: a path, or package://PACKAGE/FILE for an installed one.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(source is not None for source in (self.pretrain, self.checkpoint, self.gguf)) != 1:
            raise ValueError("give exactly one of pretrain, checkpoint, gguf")
        if self.revision and not self.checkpoint:
            raise ValueError("revision goes with checkpoint")
        return self


class DomainConfig(StrictModel):
    """One skill: a kind of domain and its options."""

    kind: str = Field(description=f"One of {', '.join(KINDS)}.")
    options: dict[str, Any] = Field(default_factory=dict, description="The kind's own options.")


class ColdStartSFT(SFTConfig):
    """The cold start: SFT on a few demonstrations of many domains."""

    domains: Literal["all"] | list[str] = Field("all", description="Domains demonstrated.")
    demonstrations: Literal["gold", "rough"] = Field("rough", description="What is imitated.")


class ColdStartConfig(StrictModel):
    """The common start of all experts and of the merge."""

    sft: ColdStartSFT = Field(description="Supervised fine-tuning on demonstrations.")


class TrainMethod(StrictModel):
    """How an expert is trained: exactly one of SFT and RL."""

    sft: SFTConfig | None = Field(None, description="Supervised fine-tuning on gold answers.")
    rl: RLConfig | None = Field(None, description="Reinforcement learning from the domain's verifiable reward.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.sft is None) == (self.rl is None):
            raise ValueError("give exactly one of sft, rl")
        return self


class ExpertConfig(StrictModel):
    """Who learns what, and how."""

    domain: str = Field(description="The domain it is trained in.")
    train: TrainMethod | None = Field(None, description="sft or rl.")
    checkpoint: str | None = Field(None, description="An expert trained elsewhere: a Hugging Face id or a directory.")
    start_from: str | None = Field(None, description="cold_start or base; the cold start when there is one.")

    @model_validator(mode="after")
    def _trained_or_given(self) -> Self:
        if (self.train is None) == (self.checkpoint is None):
            raise ValueError("give exactly one of train, checkpoint")
        return self


class AnchorConfig(StrictModel):
    """The start checkpoint teaches its own general prompts, so that the student does not forget them."""

    domains: list[str] = Field(description="Domains whose teacher is the checkpoint the merge starts from.")
    weight: float = Field(
        1.0, gt=0, description="Share of prompts of an anchor domain, relative to an expert's domain."
    )


class MergeConfig(DistillConfig):
    """The student: many teachers, one on-policy loop."""

    method: Literal["mopd"] = Field("mopd", description="Multi-teacher on-policy distillation.")
    start_from: str | None = Field(None, description="cold_start, base or an expert; the cold start when there is one.")
    domains: list[str] | None = Field(None, description="Domains practised; those with an expert when absent.")
    teachers: dict[str, str] | None = Field(None, description="domain -> expert; by default the domain's own expert.")
    fallback_teacher: str | None = Field(None, description="Expert, cold_start or base for domains without a teacher.")
    anchor: AnchorConfig | None = Field(None, description="Domains kept by the start checkpoint itself.")


class EvaluateConfig(EvaluationConfig):
    """What is measured on every checkpoint."""

    domains: Literal["all"] | list[str] = Field("all", description="Domains scored.")


class GateConfig(StrictModel):
    """What a student must show to become champion."""

    non_inferiority_margin: float = Field(
        0.08, gt=0, lt=1, description="Allowed deficit to each teacher (lower bound)."
    )
    max_forgetting: float = Field(0.05, ge=0, lt=1, description="Allowed mean drop on domains no expert trains.")
    confidence: Share = Field(0.95, description="Level of all intervals.")


class ResourcesConfig(StrictModel):
    """What the run may use. Never part of a content key, but for the number of devices of a stage."""

    gpus: int = Field(0, ge=0, description="Devices of each training stage; 0 trains on the CPU.")
    parallel_experts: int = Field(2, ge=1, description="Nodes that run side by side.")
    threads: int = Field(1, ge=1, description="CPU threads of each node's process.")
    timeout_minutes: float = Field(120, gt=0, description="A node that takes longer is ended.")
    retries: int = Field(2, ge=0, description="New attempts after an infrastructure fault.")


class RunConfig(StrictModel):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Names the run, its lock and its student.")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1, description="The graph is run once per seed.")
    base: BaseConfig = Field(description="Where everything starts.")
    domains: dict[str, DomainConfig] = Field(min_length=1, description="What there is to learn and to measure.")
    cold_start: ColdStartConfig | None = Field(None, description="The common start of the experts.")
    experts: dict[str, ExpertConfig] = Field(default_factory=dict, description="Who learns what, how.")
    merge: MergeConfig | None = Field(None, description="How the student is made.")
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, description="What is measured.")
    gate: GateConfig = Field(default_factory=GateConfig, description="When a student is promoted.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="What may be used.")

    def domain_names(self, choice: Literal["all"] | list[str]) -> list[str]:
        """Resolve `all` or a list to domain names."""
        return list(self.domains) if choice == "all" else list(choice)

    def default_start(self) -> str:
        """The checkpoint that experts and merge start from unless told otherwise."""
        return COLD_START if self.cold_start else BASE

    def teachers(self) -> dict[str, str]:
        """Route every domain the student practises to its teacher: an expert's name, `cold_start` or `base`.

        Raises:
            UserError: a domain has no teacher, or several experts could teach it.
        """
        merge = self.merge
        if merge is None:
            return {}
        routes = dict(merge.teachers or {})
        practised = merge.domains or list(
            dict.fromkeys([*routes, *(e.domain for e in self.experts.values() if merge.teachers is None)])
        )
        for domain in practised:
            if domain in routes:
                continue
            own = [name for name, expert in self.experts.items() if expert.domain == domain]
            if domain in own:
                routes[domain] = domain
            elif len(own) == 1:
                routes[domain] = own[0]
            elif len(own) > 1:
                raise UserError(
                    f"merge.teachers: domain '{domain}' has {len(own)} experts ({', '.join(own)}); name one"
                )
            elif merge.fallback_teacher:
                routes[domain] = merge.fallback_teacher
            elif merge.anchor is None or domain not in merge.anchor.domains:
                raise UserError(
                    f"merge.domains: domain '{domain}' has no teacher; route it in merge.teachers, "
                    f"add it to merge.anchor.domains, or set merge.fallback_teacher"
                )
        for domain in merge.anchor.domains if merge.anchor else []:
            if domain in routes:
                raise UserError(f"merge.anchor.domains: '{domain}' already has the teacher '{routes[domain]}'")
            routes[domain] = merge.start_from or self.default_start()
        if not routes:
            raise UserError("merge: there is no teacher; add experts, merge.teachers or merge.anchor")
        return routes


def load_run_file(path: Path, overrides: list[str] | None = None, max_steps: int | None = None) -> RunConfig:
    """Read and validate a run file.

    Args:
        path: A YAML file.
        overrides: Dotted assignments such as `experts.sort.train.rl.max_steps=50`; values are YAML.
        max_steps: Cap on the steps of every stage, to try a large run in small.

    Raises:
        UserError: names the file, the key and the nearest valid choice; all mistakes in one message.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such run file{nearest(str(path), siblings)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a run file is a mapping of keys; see flows/runs/lab.yaml")
    raw = _unshared(raw)
    for override in overrides or []:
        _apply(raw, override)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in _describe(error))) from None
    problems = _dangling_names(config)
    if problems:
        raise UserError("\n".join(f"{path}: {line}" for line in problems))
    return config if max_steps is None else RunConfig.model_validate(_capped(config.model_dump(), max_steps))


def _capped(value: Any, max_steps: int) -> Any:
    """The dumped config with no `max_steps` above the cap."""
    if isinstance(value, dict):
        return {k: min(v, max_steps) if k == "max_steps" else _capped(v, max_steps) for k, v in value.items()}
    return value


def _unshared(value: Any) -> Any:
    """A copy in which every YAML alias has values of its own, so that an override reaches one place."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': write KEY=VALUE, such as seeds=[0,1,2]")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if node is None:
            raise UserError(f"override '{override}': '{part}' holds no keys")
    if not isinstance(node, dict):
        raise UserError(f"override '{override}': '{parents[-1]}' is not a mapping")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML: {error}") from None


def _describe(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location) or "(top level)"
        if problem["type"] == "extra_forbidden":
            valid = _valid_keys(RunConfig, location[:-1])
            lines.append(f"{key}: unknown key{nearest(location[-1], valid)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r:.60})"
            lines.append(f"{key}: {message}{given}")
    return lines


def _valid_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys allowed at a location, found by walking the models' fields."""
    for depth, part in enumerate(location):
        field = model.model_fields.get(part)
        if field is None:
            return list(model.model_fields)
        annotation: Any = field.annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
        elif inner and getattr(annotation, "__origin__", None) is dict:
            return _valid_keys(inner[0], location[depth + 2 :])
        elif inner:
            model = inner[0]
        else:
            return []
    return list(model.model_fields)


def _dangling_names(config: RunConfig) -> list[str]:
    """Every reference in the run file to a domain, expert or checkpoint that is not there."""
    problems: list[str] = []

    def check(key: str, name: str, choices: list[str], what: str) -> None:
        if name not in choices:
            problems.append(f"{key}: unknown {what} '{name}'{nearest(name, choices)}")

    domains, experts = list(config.domains), list(config.experts)
    starts = [BASE, *([COLD_START] if config.cold_start else [])]
    for name, domain in config.domains.items():
        check(f"domains.{name}.kind", domain.kind, list(KINDS), "kind")
    for key, choice in (
        ("base.pretrain.domains", config.base.pretrain.domains if config.base.pretrain else "all"),
        ("cold_start.sft.domains", config.cold_start.sft.domains if config.cold_start else "all"),
        ("evaluate.domains", config.evaluate.domains),
        ("merge.domains", (config.merge.domains if config.merge else None) or []),
        ("merge.anchor.domains", config.merge.anchor.domains if config.merge and config.merge.anchor else []),
    ):
        for name in [] if choice == "all" else choice:
            check(key, name, domains, "domain")
    for name, expert in config.experts.items():
        check(f"experts.{name}.domain", expert.domain, domains, "domain")
        if name in (BASE, COLD_START, STUDENT):
            problems.append(f"experts.{name}: the name is taken by a stage; choose another")
        if expert.start_from is not None:
            check(f"experts.{name}.start_from", expert.start_from, starts, "checkpoint")
    if config.merge:
        for name, teacher in (config.merge.teachers or {}).items():
            check("merge.teachers", name, domains, "domain")
            check(f"merge.teachers.{name}", teacher, [*experts, *starts], "expert")
        if config.merge.start_from is not None:
            check("merge.start_from", config.merge.start_from, [*starts, *experts], "checkpoint")
        if config.merge.fallback_teacher is not None:
            check("merge.fallback_teacher", config.merge.fallback_teacher, [*experts, *starts], "expert")
    return problems
