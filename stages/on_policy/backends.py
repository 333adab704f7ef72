"""Builds the sampler that a stage's config names."""

from collections.abc import Callable, Mapping, Sequence

from experts.domain import Example
from stages.config.on_policy import OnPolicyConfig
from stages.learner.training import Learner
from stages.learner.workspace import Workspace
from stages.model.policy import Policy
from stages.on_policy.monitoring import Monitor
from stages.on_policy.rollout import request
from stages.rows.chat import encode_prompt
from stages.sampling.prefetch import PrefetchSampler
from stages.sampling.sampler import Request, Sampler, TransformersSampler


def make_sampler(
    config: OnPolicyConfig,
    learner: Learner,
    workspace: Workspace,
    prompts_of: Callable[[int], Sequence[Example]],
    examples: Mapping[str, Sequence[Example]],
    monitor: Monitor | None = None,
) -> Sampler:
    """Start the sampler; the caller closes it.

    Args:
        config: The stage's config.
        learner: The student.
        workspace: Servers, and a folder for an engine's files.
        prompts_of: The prompts the student will answer in a step, for rollouts one batch ahead.
        examples: All training examples by domain; the longest prompt decides the context of an engine.
        monitor: Samples with the same sampler, so that its prompts count too.

    Returns:
        The sampler of `config.sampler.backend`, with prefetching if `config.sampler.ahead` is set.

    Raises:
        UserError: vLLM is not installed, no server is named, or vLLM cannot report the log-probabilities that the
            config's temperature and top-p need.
        ServerLostError: no server answers.
    """

    def upcoming(step: int) -> Request | None:
        return request(learner, prompts_of(step), config, step) if step <= config.max_steps else None

    if config.sampler.backend == "vllm_server":
        from stages.vllm.remote_sampler import RemoteSampler

        servers = RemoteSampler(learner, config, workspace)
        if not config.sampler.ahead:
            return servers
        return PrefetchSampler(servers, upcoming, learner.accelerator.wait_for_everyone, servers.measure)
    if config.sampler.backend != "vllm":
        return TransformersSampler(learner.policy)
    # vLLM takes seconds to import.
    from stages.vllm.engine import VllmEngine

    # Of each process: it writes its adapters there.
    folder = workspace.folder / (f"engine-{learner.rank}" if learner.world_size > 1 else "engine")
    longest = longest_prompt(learner.policy, {**examples, "": monitor.examples if monitor else ()})
    return VllmEngine(learner.policy, config, folder, longest, learner)


def longest_prompt(policy: Policy, examples: Mapping[str, Sequence[Example]]) -> int:
    """Tokens of the longest prompt."""
    return max(len(encode_prompt(policy.tokenizer, example.prompt)) for drawn in examples.values() for example in drawn)
