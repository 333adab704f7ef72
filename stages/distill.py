"""MOPD stage: many teachers, one student, the student's own samples.

Each step samples completions of all domains' prompts with the student, scores each by the teacher its domain is
routed to, and updates the student towards that teacher: by a divergence over the vocabulary (logits in chunks) or its
likeliest tokens, or by the sampled token's log-ratio as a clipped advantage with an importance weight. The anchor is
one more teacher: the start checkpoint on general prompts; it is also the reference that `extrapolation` moves away
from and `reference_kl` holds on to. `outcome_weight` adds the group-normalised reward, `golden_share` cross-entropy on
gold answers, and `on_policy_fraction` below 1 lets teachers or the dataset write part of the completions. Teachers
score in this process, or on vLLM servers.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from base.store.checkpoint import Artifact
from experts.domain import Example
from stages.config.distill import DistillConfig
from stages.learner.stage import draw_prompts
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.model.policy import Policy, load_policy
from stages.on_policy.backends import make_sampler
from stages.on_policy.loop import Monitor, Practice, Writer, train_on_policy
from stages.on_policy.noise import reward_noise
from stages.on_policy.objectives import distillation_objective, needs_reference, needs_trainer_logprobs
from stages.on_policy.off_policy import DatasetWriter, GoldenRows, TeacherWriter
from stages.on_policy.preflight import SamplerCheck, preflight
from stages.on_policy.rollout import PromptMixture
from stages.on_policy.signals import RewardSignal, Signal, SumSignal, TeacherSignal, TrainerSignal
from stages.rows.chat import encode_prompt
from stages.teachers.remote_teachers import RemoteTeachers
from stages.teachers.scoring import REFERENCE, Routed, TeacherPool

Routes = dict[str, tuple[Routed, ...]]


def train(config: DistillConfig, workspace: Workspace, monitor: Monitor | None = None) -> Artifact:
    """Distil the parents `teacher/<domain>` into the checkpoint `start`.

    Args:
        config: The merge's own config.
        workspace: Parents, domains, seed and places to write to. Where `teacher_weights` names several teachers of a
            domain, the parents are `teacher/<domain>/<name>`.
        monitor: Scores the student while it trains.

    Raises:
        UserError: a domain without a teacher, a teacher with another tokenizer or whose scores disagree with its own
            forward pass, a domain too small.
    """
    start = workspace.parents["start"]
    policy = load_policy(start, workspace.store, lora=config.lora, trainable=True, seed=workspace.seed)
    examples, notes = draw_prompts(workspace, config, policy, config.max_new_tokens)
    mixture = PromptMixture(examples, config.prompts_per_step, config.domain_weights, workspace.seed)
    learner = Learner(policy, config, config.max_steps * config.updates_per_batch, workspace.progress, workspace.seed)
    routes = _routes(config, workspace)
    reference = needs_reference(config.objective)
    known: Routes = {**routes, REFERENCE: (Routed(start),)} if reference else routes
    remote = _remote(config, workspace, routes, policy)
    # A wrapper that holds the student's parameters must not see teachers' adapters among them.
    pool = TeacherPool(known, workspace.store, policy, config, lends=learner.world_size == 1, remote=remote)

    def own_prompts(step: int) -> Sequence[Example]:
        return mixture.split(step, config.on_policy_fraction)[0]

    with contextlib.ExitStack() as opened:
        if remote is not None:
            opened.callback(remote.close)
            longest = max(len(encode_prompt(policy.tokenizer, e.prompt)) for drawn in examples.values() for e in drawn)
            remote.check_room(longest + config.max_new_tokens)
        sampler = opened.enter_context(contextlib.closing(make_sampler(config, learner, workspace, own_prompts)))
        check = SamplerCheck(workspace.name, policy, sampler, examples, config)
        with learner.whole():
            preflight(check, pool, config, notes.append)
        if remote is not None:
            pool.release()
        practice = Practice(
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
            news=[sampler.news] if remote is None else [sampler.news, remote.news],
            facts={"teachers": _manifest(config, routes, mixture)},
        )
        return train_on_policy(practice, learner, config, workspace)


def _routes(config: DistillConfig, workspace: Workspace) -> Routes:
    """Who teaches each domain, and with which weight."""
    routes: Routes = {}
    for domain in workspace.domains:
        if several := config.teacher_weights.get(domain):
            named = ((workspace.parents[f"teacher/{domain}/{name}"], weight) for name, weight in several.items())
            routes[domain] = tuple(Routed(teacher, weight) for teacher, weight in named)
        elif f"teacher/{domain}" in workspace.parents:
            routes[domain] = (Routed(workspace.parents[f"teacher/{domain}"]),)
    return routes


def _remote(config: DistillConfig, workspace: Workspace, routes: Routes, policy: Policy) -> RemoteTeachers | None:
    """The teachers' servers, where they score there."""
    if config.teacher_backend == "local":
        return None
    teachers = {routed.teacher.key: routed.teacher.name for taught in routes.values() for routed in taught}
    return RemoteTeachers(workspace.servers.get("teachers", ()), teachers, config, policy.head_VH.shape[0])


def _signal(
    config: DistillConfig, workspace: Workspace, learner: Learner, pool: TeacherPool, reference: bool
) -> Signal:
    """The routed teacher, with the outcome reward and the trainer's own log-probabilities where they are asked for."""
    signals: list[Signal] = [TeacherSignal(pool, reference)]
    if config.objective.outcome_weight > 0:
        signals.append(
            RewardSignal(
                workspace.domains,
                weight=config.objective.outcome_weight,
                noise=reward_noise(config, workspace.seed),
            )
        )
    if needs_trainer_logprobs(config):
        signals.append(TrainerSignal(learner, config.temperature))
    return signals[0] if len(signals) == 1 else SumSignal(*signals)


def _writer(config: DistillConfig, workspace: Workspace, learner: Learner, pool: TeacherPool) -> Writer | None:
    """Who answers the prompts that the student does not."""
    if config.on_policy_fraction == 1.0:
        return None
    if config.off_policy == "teacher":
        return TeacherWriter(pool, config, learner)
    return DatasetWriter(workspace.domains, config, learner)


def _manifest(config: DistillConfig, routes: Routes, mixture: PromptMixture) -> list[dict[str, Any]]:
    """Which teacher taught which domain: its digest, weight, share of the prompts and objective."""
    prompts = sum(mixture.counts.values())
    objective = config.objective.key_fields()
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
