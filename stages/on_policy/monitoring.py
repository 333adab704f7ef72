"""Scores of the student during training, with the stage's own sampler."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from experts.domain import Example
from stages.config.on_policy import OnPolicyConfig
from stages.learner.training import Learner
from stages.model.policy import Policy
from stages.on_policy.mismatch import hands_over
from stages.sampling.sampler import Sampler


class Monitor(Protocol):
    """Scores the student during training."""

    @property
    def examples(self) -> Sequence[Example]:
        """The examples that it scores."""

    def due(self, step: int) -> bool:
        """Whether it scores the student after this number of steps."""

    def fits(self, policy: Policy, context: int | None) -> bool:
        """Whether a sampler with a context of so many tokens takes all its prompts."""

    def __call__(self, policy: Policy, step: int, sampler: Sampler | None = None) -> Mapping[str, float]:
        """Scores by name; empty if none are due. All processes must call it, a `sampler` with the policy's weights."""


def monitored(
    monitor: Monitor | None, learner: Learner, config: OnPolicyConfig, sampler: Sampler | None, step: int
) -> Mapping[str, float]:
    """The monitor's scores after a step; all processes must call it.

    The stage's sampler draws the completions. The student's own model does if the sampler draws ahead, which a further
    hand-over of weights would disturb, or if a prompt of the monitor exceeds the context of the sampler.

    Returns:
        Scores by name; empty if none are due.
    """
    if monitor is None or not monitor.due(step):
        return {}
    apart = hands_over(config) and not config.sampler.ahead
    if sampler is not None and apart and monitor.fits(learner.policy, sampler.context):
        sampler.update_weights(learner.policy, step)
        return monitor(learner.policy, step, sampler)
    with learner.gathered_weights():
        return monitor(learner.policy, step)
