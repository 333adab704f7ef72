"""The common parts of all training stages: drawing the data, saving progress, committing the checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from base.errors import UserError
from base.store.checkpoint import Artifact
from base.store.journal import Journal
from experts.domain import TRAIN, Example
from stages.config.command import CommandConfig
from stages.config.training import LoraConfig, TrainConfig
from stages.learner.ranks import while_others_wait
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.model.policy import Policy, load_policy
from stages.rows.chat import encode_prompt
from stages.rows.lengths import Limit, fit
from stages.rows.trained_on import TrainedOn

# Number of examples of each domain, and characters of each text, that the manifest shows to readers.
SHOWN, SHOWN_CHARACTERS = 3, 500


def load_start(workspace: Workspace, lora: LoraConfig | None = None) -> Policy:
    """The parent `start` as the policy to train, with an adapter of the stage's seed if `lora` is set.

    Raises:
        UserError: see `load_policy`.
    """
    return load_policy(
        workspace.parents["start"],
        workspace.store,
        lora=lora,
        trainable=True,
        seed=workspace.seed,
        remote_code=workspace.remote_code,
    )


def draw_training(workspace: Workspace, config: TrainConfig | CommandConfig) -> dict[str, list[Example]]:
    """Training examples of each of the stage's domains, determined by its seed.

    Raises:
        UserError: a domain has none, or fewer than requested.
    """
    # Sorted by name: the order in the run file is not part of a content key, so it must not change the result.
    names = sorted(workspace.domains)
    drawn = {name: workspace.domains[name].draw_up_to(config.examples, TRAIN, workspace.seed) for name in names}
    for name, examples in drawn.items():
        if not examples:
            raise UserError(f"domains.{name}: no training examples")
    return drawn


def draw_prompts(
    workspace: Workspace, config: TrainConfig, policy: Policy, new_tokens: int
) -> tuple[dict[str, list[Example]], list[str]]:
    """Training examples as from `draw_training`, with the config's treatment of prompts that are too long.

    Args:
        workspace: Has the domains and the seed.
        config: `max_prompt_tokens` and `longer_prompts`.
        policy: Has the tokenizer and the context length.
        new_tokens: Longest completion.

    Returns:
        The examples by domain, and lines for the journal.

    Raises:
        UserError: a domain has no examples, fewer than requested, or prompts that are too long and refused.
    """
    limit = Limit.of(config.model_dump(), policy.context, new_tokens)
    drawn_by_domain = draw_training(workspace, config)
    kept, notes = {}, left_out(workspace)
    for name, drawn in drawn_by_domain.items():
        kept[name], lines = fit(name, drawn, limit, lambda prompt: len(encode_prompt(policy.tokenizer, prompt)))
        notes += lines
    return kept, notes


def left_out(workspace: Workspace) -> list[str]:
    """Lines for the journal on the domains' data that no draw uses; complete only after a draw."""
    return [line for name in sorted(workspace.domains) for line in workspace.domains[name].left_out]


def end_step(learner: Learner, journal: Journal, step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Log a finished step, then save the state if it is due; `step` counts from 1.

    The log comes first: a journal that is ahead of the saved state is truncated on resume, one behind it would have a
    gap.
    """
    if learner.accelerator.is_main_process:
        journal.metrics(step, metrics)
        journal.progress(step, total)
    if step % learner.config.save_every == 0 and step < total:
        learner.save(step)


def finish(
    workspace: Workspace,
    learner: Learner,
    examples: Mapping[str, Sequence[Example]],
    metrics: Mapping[str, float],
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """Commit the trained policy; the main process writes it, the others wait outside of collectives.

    Args:
        workspace: The node's workspace.
        learner: The trained policy.
        examples: The training examples by domain; the artifact records their hashes.
        metrics: Final metrics.
        facts: More entries of the manifest.

    Returns:
        The committed artifact, in every process.
    """
    weights = learner.whole_parameters()

    def commit() -> None:
        folder = workspace.store.staging(workspace.key)
        learner.policy.save(folder, weights)
        workspace.commit(
            folder,
            trained_on=TrainedOn.of(workspace.domains, examples),
            metrics=metrics,
            tokens=learner.tokens,
            adapter_base=learner.policy.adapter_base,
            parameters=learner.policy.size,
            examples={domain: [shown(example) for example in drawn[:SHOWN]] for domain, drawn in examples.items()},
            **(facts or {}),
        )

    while_others_wait(commit)
    artifact = workspace.store.find(workspace.key)
    if artifact is None:
        raise RuntimeError(f"{workspace.name}: the main process did not commit {workspace.key}")
    return artifact


def shown(example: Example) -> dict[str, str]:
    """A prompt and its gold answer, shortened for readers."""
    prompt = example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]
    return {"prompt": str(prompt)[:SHOWN_CHARACTERS], "answer": example.answer[:SHOWN_CHARACTERS]}
