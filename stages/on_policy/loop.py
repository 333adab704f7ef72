"""The one on-policy loop: sample with the student, let a signal judge the samples, update the student on them.

RL and distillation are this loop with different signals and objectives; nothing else differs.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from base.store.checkpoint import Artifact
from base.store.journal import Journal
from experts.domain import Example
from stages.config.on_policy import OnPolicyConfig
from stages.learner.stage import end_step, finish
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate
from stages.learner.workspace import Workspace
from stages.losses.chunked import TokenLoss
from stages.model.policy import Policy
from stages.on_policy.balance import loss_weights
from stages.on_policy.health import Health, Vitals, compression
from stages.on_policy.mismatch import hands_over, largest, may_differ, with_mismatch
from stages.on_policy.rollout import PromptMixture, Rollout, roll_out
from stages.on_policy.signals import Judgement, Signal
from stages.sampling.sampler import Sampler, TransformersSampler

SAMPLE_EVERY = 25
# What a learner remembers of a stage.
HEALTH, METRICS = "health", "metrics"

# The loss of the tokens of some rows of a judged rollout, laid end to end in the order given.
Objective = Callable[[Rollout, Judgement, Sequence[int]], TokenLoss]
# Scores by name of the student as it is after so many steps; empty where none are due.
Monitor = Callable[[Policy, int], Mapping[str, float]]
# Sum and count of a quantity, by its name.
Sums = dict[str, tuple[float, float]]


class Writer(Protocol):
    """Answers prompts in the student's place."""

    def write(self, drawn: Sequence[Example], step: int) -> Rollout:
        """A group of completions for each prompt of this process's share."""


class Golden(Protocol):
    """Gold answers learned by cross-entropy beside the signal."""

    share: float

    def step(self, step: int) -> list[Row]:
        """This process's rows of a step; over all processes their weights sum to the share."""


@dataclass(frozen=True)
class Practice:
    """What one stage practises: whose samples, who judges them, what is minimised.

    Attributes:
        stage: Prefix of the metrics: `rl` or `distill`.
        mixture: Prompts by domain.
        signal: Judges the samples, once a step.
        objective: What the student minimises on judged samples.
        progress: The metric that shows progress, and which way is better.
        chunk_tokens: Tokens whose logits exist at one time; chosen by their size when absent.
        on_policy_fraction: Share of the prompts the student answers itself.
        writer: Answers the others.
        golden: Gold answers beside.
        sampler: Draws the student's completions; the trainer's own model when absent.
        recheck: Compares the sampler with the trainer once it has taken weights that an update has changed; returns a
            line for the log, raises where they differ.
        monitor: Scores the student while it trains.
        notes: Lines for the log before the first step.
        news: Each tells, once a step, what the log should say of the servers behind a sampler or teachers.
        facts: More for the checkpoint's manifest.
    """

    stage: str
    mixture: PromptMixture
    signal: Signal
    objective: Objective
    progress: tuple[str, Literal["higher", "lower"]]
    chunk_tokens: int | None = None
    on_policy_fraction: float = 1.0
    writer: Writer | None = None
    golden: Golden | None = None
    sampler: Sampler | None = None
    recheck: Callable[[], str] | None = None
    monitor: Monitor | None = None
    notes: Sequence[str] = ()
    news: Sequence[Callable[[], list[str]]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def train_on_policy(practice: Practice, learner: Learner, config: OnPolicyConfig, workspace: Workspace) -> Artifact:
    """Take the stage's steps from where it was left and commit the student.

    Args:
        practice: What distinguishes the stage.
        learner: The student.
        config: The stage's config.
        workspace: Where progress, journal and checkpoint go.

    Raises:
        UserError: the sampler computes something else than the trainer with weights that an update has changed.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    health = Health(config.health, practice.progress[1], learner.memory.get(HEALTH))
    metrics: dict[str, float] = learner.memory.get(METRICS, {})
    if done == 0:
        for text in practice.notes:
            _note(journal, learner, 0, text)
        _log(journal, learner, 0, _monitored(practice, learner, 0))
    recheck = practice.recheck if hands_over(config) else None
    changed = done > 0
    for step in range(done + 1, config.max_steps + 1):
        if health.stopped:
            break
        learner.begin(step)
        followed = None
        if changed and recheck is not None:
            followed, recheck = partial(_recheck, recheck, journal, learner, step), None
        rollout, judgement, metrics = take_step(practice, learner, config, step, followed)
        changed = changed or f"{practice.stage}/grad_norm" in metrics
        for text in itertools.chain(*(news() for news in practice.news)):
            _note(journal, learner, step, text)
        for text in itertools.chain(*(domain.news() for domain in workspace.domains.values())):
            _note(journal, learner, step, f"alarm: {text}")
        if step == 1 or step % SAMPLE_EVERY == 0:
            _show(journal, step, rollout, judgement, learner)
        # The teachers' scores would lie in memory beside the next step's.
        del rollout, judgement
        verdict = health.observe(step, _vitals(practice, metrics))
        for alarm in verdict.alarms:
            _note(journal, learner, step, f"alarm: {alarm}")
        if verdict.stop:
            _note(journal, learner, step, f"stopped early at step {step} of {config.max_steps}: {verdict.stop}")
        metrics |= _monitored(practice, learner, step)
        learner.memory |= {HEALTH: health.state, METRICS: metrics}
        end_step(learner, journal, step, config.max_steps, metrics)
    return finish(workspace, learner, practice.mixture.examples, metrics, practice.facts)


def take_step(
    practice: Practice,
    learner: Learner,
    config: OnPolicyConfig,
    step: int,
    followed: Callable[[], None] | None = None,
) -> tuple[Rollout, Judgement, dict[str, float]]:
    """Sample, judge, update; the step's metrics are means over all processes.

    Args:
        practice: The stage.
        learner: The student.
        config: The stage's config.
        step: Counts from 1.
        followed: Called when the sampler has taken the step's weights.
    """
    stage, clock = practice.stage, _Clock()
    with learner.whole():
        collected = _collect(practice, learner, config, step, followed)
    rollout = collected.fresh(config.sampler.max_staleness)
    clock.lap("rollout")
    lengths = [len(sample.completion_ids) for sample in rollout.samples]
    weights, shares = loss_weights(rollout.domains, lengths, config, learner, list(practice.mixture.examples))
    kept_share = 1.0 - (practice.golden.share if practice.golden else 0.0)
    rows = [
        Row(sample.tokens, len(sample.prompt_ids), weights_N * kept_share)
        for sample, weights_N in zip(rollout.samples, weights, strict=True)
    ]
    judgement = practice.signal.judge(rollout, rows)
    clock.lap("signal")
    golden = practice.golden.step(step) if practice.golden else []
    kept = [i for i in range(len(rows)) if judgement.matters(i)]
    learner.tokens += round(learner.global_sum(sum(row.scored for row in [*rows, *golden])))
    metrics: dict[str, float] = {}
    values: Mapping[str, Mapping[int, Tensor]] = {}
    for update in range(config.updates_per_batch):
        if learner.global_sum(len(kept)) == 0 and practice.golden is None:
            learner.skip_update()
            continue
        objective = partial(practice.objective, rollout, judgement)
        if update == 0 and may_differ(config):
            objective = partial(with_mismatch, objective, rollout, config.temperature)
        # What the first update measured before it moved the weights stays.
        before = {name: values.get(name, {}) for name in ("mismatch", "drift")}
        values = before | accumulate(learner, rows, objective, practice.chunk_tokens, kept)
        if practice.golden:
            imitated = accumulate(learner, golden, partial(cross_entropy, golden), practice.chunk_tokens)
            values = values | {"golden_loss": imitated.get("loss", {})}
        metrics |= learner.update()
    clock.lap("update")
    if may_differ(config) and (most := learner.largest(largest(values.get("mismatch", {})))) >= 0:
        metrics["mismatch_max"] = most
    # Ahead, what was drawn tells of older weights: the sampler measures the gap itself.
    if practice.sampler is not None and (gap := practice.sampler.gap()) is not None:
        metrics |= learner.averages({"mismatch": (gap.total, gap.tokens)})
        if (most := learner.largest(gap.most)) >= 0:
            metrics["mismatch_max"] = most
    metrics |= learner.averages(_sums(rollout, judgement, values, golden, practice.on_policy_fraction > 0))
    metrics |= {f"loss_share/{domain}": share for domain, share in shares.items() if len(shares) > 1}
    metrics["informative"] = learner.global_sum(len(kept)) / max(1.0, learner.global_sum(len(rows)))
    if config.sampler.backend == "vllm_server":
        metrics["stale"] = learner.global_sum(len(collected.samples) - len(rollout.samples))
        ages = [rollout.staleness(row) for row, own in enumerate(rollout.own) if own]
        metrics |= learner.averages({"staleness": (sum(ages), len(ages))})
    metrics |= {**judgement.facts, **clock.seconds}
    return rollout, judgement, {f"{stage}/{name}": value for name, value in metrics.items()}


def _collect(
    practice: Practice, learner: Learner, config: OnPolicyConfig, step: int, followed: Callable[[], None] | None
) -> Rollout:
    """The student's own samples, and those of whoever answers the other prompts."""
    own, others = practice.mixture.split(step, practice.on_policy_fraction)
    sampler = practice.sampler or TransformersSampler(learner.policy)
    sampler.follow(learner.policy, step - 1)
    if followed is not None:
        followed()
    rollout = roll_out(learner, sampler, own, config, step)
    if others and practice.writer:
        rollout += practice.writer.write(others, step)
    return rollout


def _sums(
    rollout: Rollout,
    judgement: Judgement,
    values: Mapping[str, Mapping[int, Tensor]],
    golden: Sequence[Row],
    only_own: bool,
) -> Sums:
    """Sum and count of every quantity, over all rows and by domain: tokens for losses, rows for rewards.

    Args:
        only_own: Whether what tells of the writer (length, reward, entropy) is told of the student's own rows alone.
    """
    sums: Sums = {}
    tells = [own or not only_own for own in rollout.own]

    def add(name: str, row: int, total: float, count: int) -> None:
        for key in (name, f"{name}/{rollout.domains[row]}"):
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + total, before[1] + count)

    for row, sample in enumerate(rollout.samples):
        if not tells[row]:
            continue
        add("length", row, len(sample.completion_ids), 1)
        add("truncated", row, not sample.finished, 1)
        for name, facts in judgement.values.items():
            add(name, row, facts[row], 1)
        squeezed = compression([rollout.completions[row]])
        if squeezed is not None:
            add("compression", row, squeezed, 1)
    for name, parts in values.items():
        if name == "golden_loss":
            sums[name] = (sum(float(part_N.sum()) for part_N in parts.values()), sum(row.scored for row in golden))
            continue
        for row, part_N in parts.items():
            # A metric that does not concern a token is NaN there.
            known_N = part_N[~part_N.isnan()]
            if name != "entropy" or tells[row]:
                add(name, row, float(known_N.sum()), len(known_N))
    return sums


def _vitals(practice: Practice, metrics: Mapping[str, float]) -> Vitals:
    """What the stage's health is judged by, by domain."""

    def by_domain(name: str) -> dict[str, float]:
        found = {domain: metrics.get(f"{practice.stage}/{name}/{domain}") for domain in practice.mixture.examples}
        return {domain: value for domain, value in found.items() if value is not None}

    whole = metrics.get(f"{practice.stage}/mismatch")
    return Vitals(
        signal=by_domain(practice.progress[0]),
        entropy=by_domain("entropy"),
        length=by_domain("length"),
        compression=by_domain("compression"),
        mismatch=by_domain("mismatch") or ({} if whole is None else {"all domains": whole}),
    )


def _monitored(practice: Practice, learner: Learner, step: int) -> dict[str, float]:
    if practice.monitor is None:
        return {}
    with learner.whole():
        scores = practice.monitor(learner.policy, step)
    return {f"{practice.stage}/{name}": value for name, value in scores.items()}


def _log(journal: Journal, learner: Learner, step: int, metrics: Mapping[str, float]) -> None:
    if metrics and learner.accelerator.is_main_process:
        journal.metrics(step, metrics)


def _recheck(check: Callable[[], str], journal: Journal, learner: Learner, step: int) -> None:
    _note(journal, learner, step, check())


def _note(journal: Journal, learner: Learner, step: int, text: str) -> None:
    if learner.accelerator.is_main_process:
        journal.note(step, text)


def _show(journal: Journal, step: int, rollout: Rollout, judgement: Judgement, learner: Learner) -> None:
    """Record one completion of each domain for a person to read."""
    if not learner.accelerator.is_main_process:
        return
    shown: set[str] = set()
    for row, example in enumerate(rollout.examples):
        if example.domain not in shown:
            shown.add(example.domain)
            facts = {name: values[row] for name, values in judgement.values.items()}
            journal.sample(
                step,
                domain=example.domain,
                prompt=example.prompt,
                answer=example.answer,
                completion=rollout.completions[row],
                weights=rollout.samples[row].version if rollout.own[row] else None,
                **facts,
            )


class _Clock:
    """Seconds of the parts of a step, on this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Close a part."""
        now = time.monotonic()
        self.seconds[f"seconds/{name}"] = now - self._last
        self._last = now
