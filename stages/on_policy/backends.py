"""The sampler a stage's config asks for."""

from experts.errors import UserError
from stages.config import OnPolicyConfig
from stages.core.training import Learner
from stages.core.workspace import Workspace
from stages.on_policy.sampler import Sampler, TransformersSampler


def make_sampler(config: OnPolicyConfig, learner: Learner, workspace: Workspace) -> Sampler:
    """Start it; whoever asks closes it.

    Raises:
        UserError: vLLM is not installed, several processes would each start an engine, or it cannot tell the
            log-probabilities that the config's temperature and top-p need.
    """
    if config.sampler.backend == "vllm_server":
        from stages.on_policy.vllm_servers import VllmServers

        return VllmServers(learner, config, workspace)
    if config.sampler.backend != "vllm":
        return TransformersSampler(learner.policy)
    if learner.world_size > 1:
        raise UserError(
            f"{workspace.name}: sampler.backend vllm runs in the trainer's process, and this stage has "
            f"{learner.world_size}; sample with backend: transformers"
        )
    # vLLM takes seconds to import.
    from stages.on_policy.vllm_engine import VllmEngine

    return VllmEngine(learner.policy, config, workspace.folder / "engine")
