"""RunConfig -> StageGraph: nodes, edges and content keys. `flows.plan.lock` compares them with the last run's.

A node's content key hashes all that changes its result: the stage and its algorithm's version, its own config,
its parents' keys, its domains' fingerprints, its seed and the number of devices. Same key, same artifact.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.hashing import stable_hash
from base.store.checkpoint import Store
from base.store.source import Source, resolve_checkpoint, resolve_gguf
from experts.domain import HELD_OUT, OUT_OF_DISTRIBUTION, Domain
from experts.loading import load_domain
from flows.plan.champion_start import champion_facts, names_champion, pinned_champion
from flows.plan.fingerprints import source_fingerprint
from flows.plan.harness import harness_tasks
from flows.plan.lock import read_lock
from flows.plan.nodes import Node, StageGraph
from flows.plan.objectives import objective_facts
from flows.plan.programs import program_facts
from flows.plan.shifts import shift_nodes, shift_request
from flows.plan.templates import Templates
from flows.run_file.baselines import baseline_config
from flows.run_file.panel import scored_domains
from flows.run_file.rounds import round_prefix, without_round
from flows.run_file.schema import BASE, BASELINES, CHAMPION, COLD_START, STUDENT, VARIANTS, RunConfig
from flows.run_file.variants import variant_run
from stages.config.command import CommandConfig, MergeCommandConfig
from stages.config.distill import DistillConfig, DistillSettings
from stages.config.evaluation import EvaluationConfig
from stages.config.kinds import STAGES
from stages.config.merge import WeightMergeConfig
from stages.config.on_policy import OnPolicyConfig, RLConfig, SamplerConfig, temperature_fault
from stages.config.roles import teacher_role
from stages.config.training import PretrainConfig, SFTConfig, TrainConfig

KEY_LENGTH = 24


def build_graph(config: RunConfig, home: Path, faults: list[str] | None = None) -> StageGraph:
    """Compose the graph of a run and key every node.

    Args:
        config: A validated run file.
        home: `$MOPD_HOME`; holds the pins of the last plan and the cache of file fingerprints.
        faults: Gets the message of a lock that is damaged, whose pins then count for nothing; None raises.

    Raises:
        UserError: an impossible run: an unknown option, a missing base, a domain without a teacher.
    """
    return _Builder(config, home, read_lock(home, config.name, faults).get("pins", {})).build()


def _load_domains(config: RunConfig) -> dict[str, Domain]:
    """All domains of the run.

    Raises:
        UserError: some cannot be made; one message names the faults of all.
    """
    domains, problems = {}, []
    for name, entry in config.domains.items():
        try:
            domains[name] = load_domain(name, entry.kind, entry.options)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return domains


class _Builder:
    """Adds each node after its parents."""

    def __init__(self, config: RunConfig, home: Path, pinned: Mapping[str, str]) -> None:
        self.config = config
        self.home = home
        self.pinned = pinned
        self.nodes: dict[str, Node] = {}
        self.pins: dict[str, str] = {}
        self.templates = Templates(config, pinned)
        self.domains = _load_domains(config)
        self.fingerprints = {name: domain.identity() for name, domain in self.domains.items()}
        self.teachers = config.teachers()
        self.harness = harness_tasks(config)
        self.variants = {n: variant_run(config, n) for n in (config.merge.variants if config.merge else ())}
        self.scored = scored_domains(config, (config, *self.variants.values()))

    def build(self) -> StageGraph:
        for seed in self.config.seeds:
            self._add_seed(seed)
        return StageGraph(self.config, tuple(self.nodes.values()), self.pins | self.templates.pins)

    def _add_seed(self, seed: int) -> None:
        config = self.config
        made = {BASE: self._base(seed)}
        if config.cold_start:
            sft = config.cold_start.sft
            made[COLD_START] = self._train(
                COLD_START, "sft", SFTConfig, sft, seed, {"start": made[BASE]}, config.domain_names(sft.domains)
            )
        if asking := names_champion(config):
            made[CHAMPION] = self._champion(asking, made[config.default_start()])
        start = made[config.default_start()]
        earlier = list(made.values())
        rounds = config.merge.rounds if config.merge else 1
        for number in range(1, rounds + 1):
            prefix = round_prefix(number, rounds)
            round_start = made.get(STUDENT, start)
            made |= self._experts(prefix, made, round_start, seed)
            if config.merge:
                parents = self._merge_parents(config, made, round_start)
                made[STUDENT] = self._distill(f"{prefix}{STUDENT}", config, seed, parents)
            earlier += made.values()
        if config.merge:
            for name, variant in self.variants.items():
                made[f"{VARIANTS}{name}"] = self._distill(
                    f"{VARIANTS}{name}", variant, seed, self._merge_parents(variant, made, round_start)
                )
            for name in config.merge.baselines.named:
                made[f"{BASELINES}{name}"] = self._baseline(name, seed, parents, start)
        checkpoints = list(dict.fromkeys([*earlier, *made.values()]))
        for checkpoint in checkpoints:
            self._add_evaluations(checkpoint, seed)
        if request := shift_request(config.evaluate):
            domains = {checkpoint: self._scored(checkpoint) for checkpoint in checkpoints}
            for node in shift_nodes(request, self.nodes, domains, start, round_start, seed):
                self._add(**node)

    def _experts(self, prefix: str, made: Mapping[str, str], start: str, seed: int) -> dict[str, str]:
        """Add a round's experts; one with a start of its own, or made elsewhere, is the same in every round."""
        experts = {}
        for name, expert in self.config.experts.items():
            if expert.checkpoint:
                source = self._resolve(f"experts.{name}.checkpoint", expert.checkpoint, None)
                experts[name] = self._load(f"experts/{name}", source)
                continue
            assert expert.train is not None
            stage, method = expert.train.chosen
            own = f"experts/{name}" if expert.start_from else f"{prefix}experts/{name}"
            parents = {"start": made[expert.start_from] if expert.start_from else start}
            if isinstance(method, CommandConfig):
                key = f"experts.{name}.train.command"
                experts[name] = self._command(own, stage, method, key, seed, parents, [expert.domain])
                continue
            experts[name] = self._train(own, stage, type(method), method, seed, parents, [expert.domain])
        return experts

    def _merge_parents(self, config: RunConfig, made: Mapping[str, str], start: str) -> dict[str, str]:
        """role -> node id of the start and the teachers: `teacher/DOMAIN`, `teacher/DOMAIN/TEACHER` where several."""
        assert config.merge is not None
        parents = {"start": made[config.merge.start_from] if config.merge.start_from else start}
        for domain, weights in config.teachers().items():
            several = len(weights) > 1
            parents |= {teacher_role(domain, name if several else ""): made[name] for name in weights}
        return parents

    def _distill(self, name: str, config: RunConfig, seed: int, parents: Mapping[str, str]) -> str:
        """Add a merge by distillation: the run's own, or that of a variant's config."""
        assert config.merge is not None
        teachers = config.teachers()
        anchor = config.merge.anchor
        weights = dict.fromkeys(anchor.domains, anchor.weight) if anchor else {}
        several = _several(teachers)
        if config.merge.command is not None:
            program = MergeCommandConfig(**config.merge.command.model_dump(), teacher_weights=several)
            return self._command(name, "merge_command", program, "merge.command", seed, parents, list(teachers))
        own = config.merge.model_copy(update={"domain_weights": weights | config.merge.domain_weights})
        return self._train(name, "distill", DistillConfig, own, seed, parents, list(teachers), teacher_weights=several)

    def _baseline(self, name: str, seed: int, merged: Mapping[str, str], origin: str) -> str:
        """Add another merge of the same parents. If it starts from a champion, which already contains the
        experts, task vectors are the experts' weights minus those of `origin`."""
        own = baseline_config(self.config, name)
        node_name, domains = f"{BASELINES}{name}", list(self.teachers)
        if isinstance(own, WeightMergeConfig):
            experts = {self.nodes[parent].name.partition("/")[2]: parent for parent in merged.values()}
            parents = {"start": origin if merged["start"] == CHAMPION else merged["start"]} | {
                teacher_role(name): parent for name, parent in experts.items() if name
            }
            facts = {"config": own.key_fields()}
            return self._add(
                f"{node_name}@{seed}", node_name, "merge_weights", seed, own.model_dump(mode="json"), facts, parents, []
            )
        if isinstance(own, DistillSettings):
            several = _several(self.teachers)
            return self._train(node_name, "distill", DistillConfig, own, seed, merged, domains, teacher_weights=several)
        stage = "rl" if isinstance(own, RLConfig) else "sft"
        assert isinstance(own, TrainConfig)
        return self._train(node_name, stage, type(own), own, seed, {"start": merged["start"]}, domains)

    def _base(self, seed: int) -> str:
        base = self.config.base
        if base.pretrain:
            own, names = base.pretrain, self.config.domain_names(base.pretrain.domains)
            if names == [domain for domain in self.config.domains if domain in names]:
                # The fingerprints of the listed domains are in the key, so a later domain does not change such a base.
                own = own.model_copy(update={"domains": "all"})
            return self._train(BASE, "pretrain", PretrainConfig, own, seed, {}, names)
        if base.gguf:
            return self._load(BASE, resolve_gguf(base.gguf))
        return self._load(BASE, self._resolve("base.checkpoint", base.checkpoint, base.revision))

    def _champion(self, asking: str, start: str) -> str:
        """Add the run's champion, which is already in the store; all seeds share it."""
        if CHAMPION not in self.nodes:
            artifact = pinned_champion(self.config, self.home, asking, self.pinned)
            facts = champion_facts(artifact, Store(self.home), (start, self.nodes[start].key))
            self.nodes[CHAMPION] = Node(**facts)
            self.pins[CHAMPION] = artifact.key
            self.templates.inherit(CHAMPION, start)
        return CHAMPION

    def _load(self, name: str, source: Source) -> str:
        """Add the import of a checkpoint made elsewhere; all seeds share it."""
        config = {"kind": source.kind, "location": source.location, "revision": source.revision}
        made = self._add(name, name, "load", 0, config, {"content": source_fingerprint(source, self.home)}, {}, [])
        self.templates.load(made, source, Store(self.home).find(self.nodes[made].key))
        return made

    def _resolve(self, key: str, reference: str | None, revision: str | None) -> Source:
        assert reference is not None
        asked = f"{reference}@{revision or 'default'}"
        source = resolve_checkpoint(key, reference, revision, self.pinned.get(asked))
        if source.revision:
            self.pins[asked] = source.revision
        return source

    def _train(
        self,
        name: str,
        stage: str,
        schema: type[TrainConfig],
        config: TrainConfig,
        seed: int,
        parents: Mapping[str, str],
        domains: list[str],
        **derived: Any,
    ) -> str:
        """Add a training stage. Of the run file's entry only the stage's own fields reach it; `derived` has those that
        the plan sets."""
        fields = {field: getattr(config, field) for field in schema.model_fields if field not in derived} | derived
        if isinstance(config, OnPolicyConfig):
            fields["sampler"] = self._sampler(name, config.sampler, config.temperature)
        own = schema.model_validate(fields)
        self._check_adapter(name, own, parents)
        facts: dict[str, Any] = {"config": own.key_fields()}
        if isinstance(own, DistillConfig):
            facts |= objective_facts(own.objective)
        return self._add(f"{name}@{seed}", name, stage, seed, own.model_dump(mode="json"), facts, parents, domains)

    def _command(
        self,
        name: str,
        stage: str,
        own: CommandConfig,
        key: str,
        seed: int,
        parents: Mapping[str, str],
        domains: list[str],
    ) -> str:
        """Add a stage that a program makes; the contents of its files and of its variables are part of the key."""
        facts = program_facts(key, own)
        return self._add(f"{name}@{seed}", name, stage, seed, own.model_dump(mode="json"), facts, parents, domains)

    def _sampler(self, name: str, own: SamplerConfig, temperature: float) -> SamplerConfig:
        """A stage's sampler, with the run's backend where it names none."""
        backend = own.backend or self.config.resources.sampler
        if fault := temperature_fault(temperature, backend):
            raise UserError(f"{name}: {fault} (resources.sampler: {backend})")
        if own.ahead and backend != "vllm_server":
            raise UserError(
                f"{name}: sampler.ahead needs servers that sample while the trainer updates; the sampler is "
                f"{backend}, set resources.sampler to vllm_server"
            )
        # None is transformers, so the default has one key.
        return own.model_copy(update={"backend": None if backend == "transformers" else backend})

    def _add(
        self,
        node_id: str,
        name: str,
        stage: str,
        seed: int,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        parents: Mapping[str, str],
        domains: list[str],
    ) -> str:
        if node_id in self.nodes:
            return node_id
        ingredients = {
            "stage": stage,
            "version": STAGES[stage].version,
            "seed": seed,
            "parents": {role: self.nodes[parent].key for role, parent in parents.items()},
            "domains": {domain: self.fingerprints[domain] for domain in domains},
            **facts,
            **self.templates.facts(stage, config, parents.get("start", parents.get("checkpoint"))),
        }
        self.templates.inherit(node_id, parents.get("start"))
        if STAGES[stage].trains:
            ingredients["world_size"] = max(1, self.config.resources.gpus)
        entries = {d: self.config.domains[d].model_dump(mode="json") for d in domains}
        key = stable_hash(ingredients)[:KEY_LENGTH]
        self.nodes[node_id] = Node(node_id, name, stage, seed, config, dict(parents), entries, ingredients, key)
        return node_id

    def _add_evaluations(self, checkpoint: str, seed: int) -> None:
        evaluate = self.config.evaluate
        own = EvaluationConfig.model_validate({f: getattr(evaluate, f) for f in EvaluationConfig.model_fields})
        name = self.nodes[checkpoint].name
        suffix = "" if checkpoint == name else f"@{seed}"
        for domain in self._scored(checkpoint):
            for split in self.domains[domain].splits:
                if split in (HELD_OUT, OUT_OF_DISTRIBUTION):
                    node_name = f"eval/{name}/{domain}/{split}"
                    full = own.model_dump(mode="json") | {"domain": domain, "split": split}
                    facts = {"config": own.key_fields(), "split": split}
                    parents = {"checkpoint": checkpoint}
                    self._add(f"{node_name}{suffix}", node_name, "evaluate", 0, full, facts, parents, [domain])
        for task, facts in self.harness:
            node_name, parents = f"eval/{name}/{task.domain}/{task.split}", {"checkpoint": checkpoint}
            self._add(f"{node_name}{suffix}", node_name, "harness", 0, task.model_dump(mode="json"), facts, parents, [])

    def _scored(self, checkpoint: str) -> list[str]:
        """The domains a checkpoint is scored on: all, or for an expert its `scored` ones."""
        role, _, expert = without_round(self.nodes[checkpoint].name).partition("/")
        return self.scored[expert] if role == "experts" else self.config.domain_names(self.config.evaluate.domains)

    def _check_adapter(self, name: str, config: TrainConfig, parents: Mapping[str, str]) -> None:
        """Check that an adapter has the shape of the adapter it starts from."""
        if config.lora is None or "start" not in parents:
            return
        start = self.nodes[parents["start"]]
        theirs = start.config.get("lora")
        mine = config.lora.model_dump(mode="json")
        if theirs is not None and theirs != mine:
            raise UserError(
                f"{name}: its lora {mine} differs from that of the checkpoint it starts from, {start.name}: {theirs}; "
                f"an adapter keeps its shape in further training"
            )


def _several(teachers: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The weights of the domains that several teachers teach."""
    return {domain: weights for domain, weights in teachers.items() if len(weights) > 1}
