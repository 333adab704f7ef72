"""MOPD stage: many teachers, one student, the student's own samples.

Each step samples completions of all domains' prompts with the student, scores each by the teacher its domain is
routed to, and updates the student towards that teacher: by a divergence over the vocabulary (logits in chunks) or its
likeliest tokens, or by the sampled token's log-ratio as a clipped advantage with an importance weight. The anchor is
one more teacher: the start checkpoint on general prompts. The start checkpoint is also the reference that
`extrapolation` moves away from and that `reference_kl` stays close to. `outcome_weight` adds the group-normalised
reward, `golden_share` cross-entropy on gold answers. With `on_policy_fraction` below 1, teachers or the dataset write
part of the completions. Teachers score in this process, or on vLLM servers.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from base.store.checkpoint import Artifact
from experts.domain import Example
from stages.config.distill import DistillConfig
from stages.config.objective import PythonObjective, TargetObjective
from stages.config.roles import teacher_role
from stages.learner.stage import draw_prompts, load_start
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.on_policy.backends import longest_prompt, make_sampler
from stages.on_policy.loop import OnPolicyTask, Writer, train_on_policy
from stages.on_policy.monitoring import Monitor
from stages.on_policy.objectives import distillation_objective, needs_reference, needs_trainer_logprobs
from stages.on_policy.off_policy import DatasetWriter, GoldenRows, TeacherWriter
from stages.on_policy.own_objective import require_unchanged
from stages.on_policy.preflight import SamplerCheck, preflight
from stages.on_policy.rollout import PromptMixture
from stages.on_policy.signals import RewardSignal, Signal, SumSignal, TeacherSignal, TrainerSignal
from stages.teachers.remote_teachers import RemoteTeachers
from stages.teachers.scoring import REFERENCE, Routed, TeacherPool

Routes = dict[str, tuple[Routed, ...]]


def train(config: DistillConfig, workspace: Workspace, monitor: Monitor | None = None) -> Artifact:
    """Distil the parents `teacher/<domain>` into the checkpoint `start`.

    Args:
        config: The merge's own config.
        workspace: Parents, domains, seed and folders. If `teacher_weights` names several teachers of a domain, the
            parents are `teacher/<domain>/<name>`.
        monitor: Scores the student during training.

    Returns:
        The committed student.

    Raises:
        UserError: a domain has no teacher or too few examples, or a teacher has another tokenizer or scores that
            disagree with its own forward pass.
    """
    if isinstance(config.objective, PythonObjective):
        require_unchanged(config.objective, workspace.provenance.get("ingredients", {}))
    start = workspace.parents["start"]
    policy = load_start(workspace, config.lora)
    examples, notes = draw_prompts(workspace, config, policy, config.max_new_tokens)
    mixture = PromptMixture(examples, config.prompts_per_step, config.domain_weights, workspace.seed)
    learner = Learner(policy, config, config.max_steps * config.updates_per_batch, workspace.progress, workspace.seed)
    routes = _routes(config, workspace)
    reference = needs_reference(config.objective)
    all_routes: Routes = {**routes, REFERENCE: (Routed(start),)} if reference else routes
    remote = _remote(config, workspace, routes, policy)
    # A data-parallel wrapper of the student's parameters must not contain teachers' adapters.
    pool = TeacherPool(all_routes, workspace.store, policy, config, share_base=learner.world_size == 1, remote=remote)

    def own_prompts(step: int) -> Sequence[Example]:
        return mixture.split(step, config.on_policy_fraction)[0]

    with contextlib.ExitStack() as opened:
        if remote is not None:
            opened.callback(remote.close)
            remote.check_room(longest_prompt(policy, examples) + config.max_new_tokens)
        sampler = opened.enter_context(
            contextlib.closing(make_sampler(config, learner, workspace, own_prompts, examples, monitor))
        )
        check = SamplerCheck(workspace.name, policy, sampler, examples, config)
        with learner.gathered_weights():
            preflight(check, pool, config, notes.append)
        task = OnPolicyTask(
            stage="distill",
            mixture=mixture,
            signal=_signal(config, workspace, learner, pool, reference),
            objective=distillation_objective(config, learner),
            progress=("reverse_kl", "lower"),
            chunk_tokens=config.objective.chunk_tokens,
            on_policy_fraction=config.on_policy_fraction,
            writer=_writer(config, workspace, learner, pool),
            golden=GoldenRows(examples, workspace.domains, config, learner) if config.objective.golden_share else None,
            sampler=sampler,
            recheck=check.again,
            monitor=monitor,
            notes=notes,
            logs=[sampler.drain_log] if remote is None else [sampler.drain_log, remote.drain_log],
            facts={"teachers": _manifest(config, routes, mixture)},
        )
        return train_on_policy(task, learner, config, workspace)


def _routes(config: DistillConfig, workspace: Workspace) -> Routes:
    """The teachers of each domain, with their weights."""
    routes: Routes = {}
    for domain in workspace.domains:
        if several := config.teacher_weights.get(domain):
            named = ((workspace.parents[teacher_role(domain, name)], weight) for name, weight in several.items())
            routes[domain] = tuple(Routed(teacher, weight) for teacher, weight in named)
        elif (role := teacher_role(domain)) in workspace.parents:
            routes[domain] = (Routed(workspace.parents[role]),)
    return routes


def _remote(config: DistillConfig, workspace: Workspace, routes: Routes, policy: Policy) -> RemoteTeachers | None:
    """The client of the teachers' servers; None if teachers score in this process."""
    if config.teacher_backend == "local":
        return None
    teachers = {routed.teacher.key: routed.teacher.name for taught in routes.values() for routed in taught}
    return RemoteTeachers(workspace.servers.get("teachers", ()), teachers, config, policy.head_VH.shape[0])


def _signal(
    config: DistillConfig, workspace: Workspace, learner: Learner, pool: TeacherPool, reference: bool
) -> Signal:
    """The routed teacher, plus the outcome reward and the trainer's own log-probabilities if the config needs them."""
    signals: list[Signal] = [TeacherSignal(pool, reference)]
    if isinstance(config.objective, TargetObjective) and config.objective.rewarded:
        signals.append(RewardSignal(workspace.domains, weight=config.objective.outcome_weight))
    if needs_trainer_logprobs(config):
        signals.append(TrainerSignal(learner, config.temperature))
    return signals[0] if len(signals) == 1 else SumSignal(*signals)


def _writer(config: DistillConfig, workspace: Workspace, learner: Learner, pool: TeacherPool) -> Writer | None:
    """The writer of the completions that the student does not write; None if it writes all."""
    if config.on_policy_fraction == 1.0:
        return None
    if config.off_policy == "teacher":
        return TeacherWriter(pool, config, learner)
    return DatasetWriter(workspace.domains, config, learner)


def _manifest(config: DistillConfig, routes: Routes, mixture: PromptMixture) -> list[dict[str, Any]]:
    """The manifest's entry for each teacher of each domain: its digest, weight, share of the prompts and objective."""
    prompts = sum(mixture.counts.values())
    objective = config.objective.model_dump(mode="json")
    return [
        {
            "domain": domain,
            "teacher": routed.teacher.name,
            "key": routed.teacher.key,
            "digest": routed.teacher.digest,
            "weight": routed.weight / sum(r.weight for r in taught),
            "prompt_share": mixture.counts[domain] / prompts,
            "objective": objective,
        }
        for domain, taught in sorted(routes.items())
        for routed in taught
    ]
