"""The one on-policy loop: sample with the student, score the samples by a signal, update the student on them.

RL and distillation are this loop with different signals and objectives; nothing else differs.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from base.store.checkpoint import Artifact
from base.store.journal import Journal
from experts.domain import Example
from stages.config.on_policy import OnPolicyConfig, SamplerConfig
from stages.learner.stage import end_step, finish
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate
from stages.learner.workspace import Workspace
from stages.losses.chunked import TokenLoss
from stages.on_policy.balance import loss_weights
from stages.on_policy.clock import Clock
from stages.on_policy.health import Health, Vitals, compression
from stages.on_policy.mismatch import hands_over, largest, may_differ, with_mismatch
from stages.on_policy.monitoring import Monitor, monitored
from stages.on_policy.rollout import PromptMixture, Rollout, roll_out
from stages.on_policy.signals import Signal, Signals
from stages.sampling.sampler import Sampler, TransformersSampler

SAMPLE_EVERY = 25
# Keys of a learner's memory.
HEALTH, METRICS = "health", "metrics"

# The loss of the concatenated tokens of some rows of a scored rollout, in the order given.
Objective = Callable[[Rollout, Signals, Sequence[int]], TokenLoss]
# Sum and count of a quantity, by its name.
Sums = dict[str, tuple[float, float]]


class Writer(Protocol):
    """Writes completions instead of the student."""

    def write(self, drawn: Sequence[Example], step: int) -> Rollout:
        """A group of completions for each prompt of this process's share."""


class Golden(Protocol):
    """Gold answers learned by cross-entropy in addition to the signal."""

    share: float

    def step(self, step: int) -> list[Row]:
        """This process's rows of a step; over all processes their weights sum to the share."""


@dataclass(frozen=True)
class OnPolicyTask:
    """What distinguishes one on-policy stage: its prompts, sampler, signal and objective.

    Attributes:
        stage: Prefix of the metrics: `rl`, `rft` or `distill`.
        mixture: Prompts by domain.
        signal: Scores the samples, once per step.
        objective: The loss that the student minimises on scored samples.
        progress: The metric that shows progress, and its better direction.
        chunk_tokens: Tokens whose logits exist at the same time; chosen by the size of their logits when absent.
        on_policy_fraction: Share of the prompts that the student answers itself.
        writer: Writes the completions of the other prompts.
        golden: Gold answers learned in addition to the signal.
        sampler: Draws the student's completions; the trainer's own model when absent.
        recheck: Compares the sampler with the trainer once it has received weights that an update has changed; returns
            a line for the log, and raises if they differ.
        monitor: Scores the student during training.
        notes: Lines for the log before the first step.
        logs: Each is called once per step, and returns the new log lines of the servers of a sampler or of teachers.
        facts: More entries of the checkpoint's manifest.
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
    logs: Sequence[Callable[[], list[str]]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def train_on_policy(task: OnPolicyTask, learner: Learner, config: OnPolicyConfig, workspace: Workspace) -> Artifact:
    """Run the stage's steps from its last saved state, and commit the student.

    Args:
        task: What distinguishes the stage.
        learner: The student.
        config: The stage's config.
        workspace: Where progress, journal and checkpoint go.

    Raises:
        UserError: with weights that an update has changed, the sampler's log-probabilities differ from the trainer's.
    """
    done = learner.resume()
    journal = workspace.journal(done)
    health = Health(config.health, task.progress[1], learner.memory.get(HEALTH))
    metrics: dict[str, float] = learner.memory.get(METRICS, {})
    if done == 0:
        for text in task.notes:
            _note(journal, learner, 0, text)
        _log(journal, learner, 0, _monitored(task, learner, config, 0))
    recheck = task.recheck if hands_over(config) else None
    changed = done > 0
    for step in range(done + 1, config.max_steps + 1):
        if health.stopped:
            break
        learner.seed_step(step)
        weights_sent = None
        if changed and recheck is not None:
            weights_sent, recheck = partial(_recheck, recheck, journal, learner, step), None
        rollout, signals, metrics = take_step(task, learner, config, step, weights_sent)
        changed = changed or f"{task.stage}/grad_norm" in metrics
        for text in itertools.chain(*(drain() for drain in task.logs)):
            _note(journal, learner, step, text)
        for text in itertools.chain(*(domain.news() for domain in workspace.domains.values())):
            _note(journal, learner, step, f"alarm: {text}")
        if step == 1 or step % SAMPLE_EVERY == 0:
            _show(journal, step, rollout, signals, learner)
        # The teachers' scores would stay in memory during the next step.
        del rollout, signals
        verdict = health.observe(step, _vitals(task, metrics))
        for alarm in verdict.alarms:
            _note(journal, learner, step, f"alarm: {alarm}")
        if verdict.stop:
            _note(journal, learner, step, f"stopped early at step {step} of {config.max_steps}: {verdict.stop}")
        metrics |= _monitored(task, learner, config, step)
        learner.memory |= {HEALTH: health.state, METRICS: metrics}
        end_step(learner, journal, step, config.max_steps, metrics)
    return finish(workspace, learner, task.mixture.examples, metrics, task.facts)


def take_step(
    task: OnPolicyTask,
    learner: Learner,
    config: OnPolicyConfig,
    step: int,
    weights_sent: Callable[[], None] | None = None,
) -> tuple[Rollout, Signals, dict[str, float]]:
    """Sample, score, update; the step's metrics are means over all processes.

    Args:
        task: The stage.
        learner: The student.
        config: The stage's config.
        step: Counts from 1.
        weights_sent: Called when the sampler has received the step's weights.

    Returns:
        The rollout, its signals, and the metrics by name.
    """
    clock = Clock()
    here = _computes_here(config.sampler, weights_sent)
    with learner.gathered_weights() if here else contextlib.nullcontext():
        collected = _collect(task, learner, config, step, weights_sent)
    rollout = collected.drop_stale(config.sampler.max_staleness)
    clock.lap("rollout")
    lengths = [len(sample.completion_ids) for sample in rollout.samples]
    weights, shares = loss_weights(rollout.domains, lengths, config, learner, list(task.mixture.examples))
    kept_share = 1.0 - (task.golden.share if task.golden else 0.0)
    rows = [
        Row(sample.tokens, len(sample.prompt_ids), weights_N * kept_share)
        for sample, weights_N in zip(rollout.samples, weights, strict=True)
    ]
    signals = task.signal.score(rollout, rows)
    clock.lap("signal")
    golden = task.golden.step(step) if task.golden else []
    kept = [i for i in range(len(rows)) if signals.has_signal(i)]
    learner.tokens += round(learner.global_sum(sum(row.scored for row in [*rows, *golden])))
    metrics: dict[str, float] = {}
    values: Mapping[str, Mapping[int, Tensor]] = {}
    for update in range(config.updates_per_batch):
        if learner.global_sum(len(kept)) == 0 and task.golden is None:
            learner.skip_update()
            continue
        objective = partial(task.objective, rollout, signals)
        if update == 0 and may_differ(config):
            objective = partial(with_mismatch, objective, rollout, config.temperature)
        # Keep what the first update measured before it changed the weights.
        before = {name: values.get(name, {}) for name in ("mismatch", "drift")}
        values = before | accumulate(learner, rows, objective, task.chunk_tokens, kept)
        if task.golden:
            imitated = accumulate(learner, golden, partial(cross_entropy, golden), task.chunk_tokens)
            values = values | {"golden_loss": imitated.get("loss", {})}
        metrics |= learner.update()
    clock.lap("update")
    if may_differ(config) and (most := learner.largest(largest(values.get("mismatch", {})))) >= 0:
        metrics["mismatch_max"] = most
    # Prefetched samples were drawn with older weights, so their sampler measures the gap itself.
    if task.sampler is not None and (gap := task.sampler.logprob_gap()) is not None:
        metrics |= learner.averages({"mismatch": (gap.total, gap.tokens)})
        if (most := learner.largest(gap.most)) >= 0:
            metrics["mismatch_max"] = most
    metrics |= learner.averages(_sums(rollout, signals, values, golden, task.on_policy_fraction > 0))
    metrics |= {f"loss_share/{domain}": share for domain, share in shares.items() if len(shares) > 1}
    metrics["informative"] = learner.global_sum(len(kept)) / max(1.0, learner.global_sum(len(rows)))
    if config.sampler.backend == "vllm_server":
        metrics["stale"] = learner.global_sum(len(collected.samples) - len(rollout.samples))
        ages = [rollout.staleness(row) for row, own in enumerate(rollout.on_policy) if own]
        metrics |= learner.averages({"staleness": (sum(ages), len(ages))})
    metrics |= {**signals.facts, **clock.seconds}
    return rollout, signals, {f"{task.stage}/{name}": value for name, value in metrics.items()}


def _computes_here(sampler: SamplerConfig, weights_sent: Callable[[], None] | None) -> bool:
    """Whether a rollout, or measuring the gap to vLLM, takes forward passes of the whole student in this process."""
    return sampler.backend not in ("vllm", "vllm_server") or sampler.ahead or weights_sent is not None


def _collect(
    task: OnPolicyTask, learner: Learner, config: OnPolicyConfig, step: int, weights_sent: Callable[[], None] | None
) -> Rollout:
    """The student's own samples, and the writer's for the other prompts."""
    own, others = task.mixture.split(step, task.on_policy_fraction)
    sampler = task.sampler or TransformersSampler(learner.policy)
    sampler.update_weights(learner.policy, step - 1)
    if weights_sent is not None:
        weights_sent()
    rollout = roll_out(learner, sampler, own, config, step)
    if others and task.writer:
        rollout += task.writer.write(others, step)
    return rollout


def _sums(
    rollout: Rollout,
    signals: Signals,
    values: Mapping[str, Mapping[int, Tensor]],
    golden: Sequence[Row],
    only_own: bool,
) -> Sums:
    """Sum and count of every quantity, over all rows and by domain: tokens for losses, rows for rewards.

    Args:
        only_own: Whether quantities of the writer (length, reward, entropy) count the student's own rows alone.
    """
    sums: Sums = {}
    counted = [own or not only_own for own in rollout.on_policy]

    def add(name: str, row: int, total: float, count: int) -> None:
        for key in (name, f"{name}/{rollout.domains[row]}"):
            before = sums.get(key, (0.0, 0.0))
            sums[key] = (before[0] + total, before[1] + count)

    for row, sample in enumerate(rollout.samples):
        if not counted[row]:
            continue
        add("length", row, len(sample.completion_ids), 1)
        add("truncated", row, not sample.finished, 1)
        for name, facts in signals.values.items():
            add(name, row, facts[row], 1)
        squeezed = compression([rollout.completions[row]])
        if squeezed is not None:
            add("compression", row, squeezed, 1)
    for name, parts in values.items():
        if name == "golden_loss":
            sums[name] = (sum(float(part_N.sum()) for part_N in parts.values()), sum(row.scored for row in golden))
            continue
        for row, part_N in parts.items():
            # A metric is NaN for tokens to which it does not apply.
            valid_N = part_N[~part_N.isnan()]
            if name != "entropy" or counted[row]:
                add(name, row, float(valid_N.sum()), len(valid_N))
    return sums


def _vitals(task: OnPolicyTask, metrics: Mapping[str, float]) -> Vitals:
    """The step's measurements for the health check, by domain."""

    def by_domain(name: str) -> dict[str, float]:
        found = {domain: metrics.get(f"{task.stage}/{name}/{domain}") for domain in task.mixture.examples}
        return {domain: value for domain, value in found.items() if value is not None}

    whole = metrics.get(f"{task.stage}/mismatch")
    return Vitals(
        signal=by_domain(task.progress[0]),
        entropy=by_domain("entropy"),
        length=by_domain("length"),
        compression=by_domain("compression"),
        mismatch=by_domain("mismatch") or ({} if whole is None else {"all domains": whole}),
    )


def _monitored(task: OnPolicyTask, learner: Learner, config: OnPolicyConfig, step: int) -> dict[str, float]:
    scores = monitored(task.monitor, learner, config, task.sampler, step)
    return {f"{task.stage}/{name}": value for name, value in scores.items()}


def _log(journal: Journal, learner: Learner, step: int, metrics: Mapping[str, float]) -> None:
    if metrics and learner.accelerator.is_main_process:
        journal.metrics(step, metrics)


def _recheck(check: Callable[[], str], journal: Journal, learner: Learner, step: int) -> None:
    _note(journal, learner, step, check())


def _note(journal: Journal, learner: Learner, step: int, text: str) -> None:
    if learner.accelerator.is_main_process:
        journal.note(step, text)


def _show(journal: Journal, step: int, rollout: Rollout, signals: Signals, learner: Learner) -> None:
    """Record one completion of each domain in the journal, for readers."""
    if not learner.accelerator.is_main_process:
        return
    shown: set[str] = set()
    for row, example in enumerate(rollout.examples):
        if example.domain not in shown:
            shown.add(example.domain)
            facts = {name: values[row] for name, values in signals.values.items()}
            journal.sample(
                step,
                domain=example.domain,
                prompt=example.prompt,
                answer=example.answer,
                completion=rollout.completions[row],
                weights=rollout.samples[row].version if rollout.on_policy[row] else None,
                **facts,
            )
