"""Parts of cases on the pretended device that are not one call of a stage."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from experts.domain import Domain
from stages.config.objective import ReverseKL, TopKConfig
from stages.learner.training import Learner
from stages.on_policy.objectives import divergence
from stages.on_policy.rollout import Rollout
from stages.teachers.remote_teachers import RemoteScores, TopLogprobs
from tests.vcuda.device import CUDA, marks


class CutOffError(Exception):
    """A stage was ended after its first saved state."""


def last_bits(rollout: Rollout, domains: Mapping[str, Domain]) -> list[float]:
    """Rewards that differ within a group."""
    del domains
    return [sum(drawn.completion_ids) % 2.0 for drawn in rollout.samples]


def remote_scores() -> None:
    """What a teachers' server tells, read as logits where the student's are."""
    known = [TopLogprobs.of([{1: -0.1, 2: -2.5, 5: -4.0}], [5], 3, 113) for _ in range(2)]
    logits = torch.randn(2, 113).to("cuda").requires_grad_(True)
    config = ReverseKL(type="reverse_kl", top_k=TopKConfig(k=3))
    losses, _ = divergence(config, logits, RemoteScores(known, 113, {}, CUDA).logits([0, 1])(slice(0, 2)))
    losses.sum().backward()
    assert marks.device(logits.grad) == CUDA


def resumed(run: Callable[[], Any]) -> None:
    """Run a stage to its first saved state, then again from there."""
    save = Learner.save

    def cut(self: Learner, step: int) -> None:
        save(self, step)
        raise CutOffError

    Learner.save = cut
    try:
        with contextlib.suppress(CutOffError):
            run()
            raise AssertionError("nothing was saved")
    finally:
        Learner.save = save
    run()
