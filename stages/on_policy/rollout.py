"""The data of one step of the on-policy loop: prompts drawn by the domain mixture, and the student's completions."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import UserError
from experts.domain import Domain, Example
from stages.config.on_policy import OnPolicyConfig
from stages.learner.training import Item, Learner, epochs, step_seed
from stages.model.policy import Policy
from stages.on_policy.shares import apportion, without_prompts
from stages.rows.chat import encode_prompt
from stages.sampling.sampler import Request, Sampler
from stages.sampling.samples import Sample, Sampling


@dataclass(frozen=True)
class Rollout:
    """The samples of one step; the rows of a group are adjacent.

    The student draws them, except for the off-policy share that a config may set.

    Attributes:
        step: Counts from 1.
        examples: The example of each row.
        samples: The completion of each row.
        completions: The text of each row's completion.
        on_policy: Whether the student drew the row.
        group_size: Rows of one prompt.
    """

    step: int
    examples: list[Example]
    samples: list[Sample]
    completions: list[str]
    on_policy: list[bool]
    group_size: int

    @property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return [example.domain for example in self.examples]

    def __add__(self, other: "Rollout") -> "Rollout":
        """This rollout's rows, then those of `other`."""
        return Rollout(
            self.step,
            self.examples + other.examples,
            self.samples + other.samples,
            self.completions + other.completions,
            self.on_policy + other.on_policy,
            self.group_size,
        )

    def staleness(self, row: int) -> int:
        """The batches of updates between the weights that drew a row and this step's weights."""
        return self.step - 1 - self.samples[row].version

    def drop_stale(self, most: int) -> "Rollout":
        """The rollout without groups that have a row of staleness above `most`; off-policy rows are never stale."""
        groups = [range(first, first + self.group_size) for first in range(0, len(self.samples), self.group_size)]
        kept = [
            row
            for group in groups
            if all(not self.on_policy[i] or self.staleness(i) <= most for i in group)
            for row in group
        ]
        return Rollout(
            self.step,
            [self.examples[row] for row in kept],
            [self.samples[row] for row in kept],
            [self.completions[row] for row in kept],
            [self.on_policy[row] for row in kept],
            self.group_size,
        )

    def tokens(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The concatenated completion tokens [N] of the rows."""
        return torch.tensor([token for row in rows for token in self.samples[row].completion_ids], device=device)

    def logprobs(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Log-probabilities [N] of those tokens under the policy that drew them; NaN if no policy drew them."""
        return torch.cat([self.samples[row].logprobs_N for row in rows]).to(device)


class PromptMixture:
    """Training prompts by domain, each domain an endless shuffled stream; every step takes the same share of each.

    Args:
        examples: Training examples of each domain.
        per_step: Prompts of one step, over all domains.
        weights: Share of a domain relative to 1.
        seed: Seed of the order.

    Raises:
        UserError: a domain's share of a step is less than one prompt.
    """

    def __init__(
        self, examples: Mapping[str, Sequence[Example]], per_step: int, weights: Mapping[str, float], seed: int
    ) -> None:
        self.examples = examples
        self.seed = seed
        every = {name: weights.get(name, 1.0) for name in examples}
        if problems := without_prompts(per_step, every):
            raise UserError("\n".join(problems))
        self.counts = apportion(per_step, every)

    def step(self, step: int) -> list[Example]:
        """The prompts of a step; `step` counts from 1."""
        return self.split(step, 1.0)[0]

    def split(self, step: int, fraction: float) -> tuple[list[Example], list[Example]]:
        """The prompts of a step in two parts; over all steps so far the first has `fraction` of each domain's."""
        first: list[Example] = []
        second: list[Example] = []
        for name, items in self.examples.items():
            count = self.counts[name]
            drawn = _slice(items, self.seed, (step - 1) * count, count)
            own = math.floor(step * count * fraction) - math.floor((step - 1) * count * fraction)
            first += drawn[:own]
            second += drawn[own:]
        return first, second


def _slice(items: Sequence[Item], seed: int, first: int, count: int) -> list[Item]:
    """Items `first` to `first + count` of the endless stream, without iterating over earlier epochs."""
    epoch, offset = divmod(first, len(items))
    return list(itertools.islice(epochs(items, seed, epoch), offset, offset + count))


def roll_out(
    learner: Learner, sampler: Sampler, drawn: Sequence[Example], config: OnPolicyConfig, step: int
) -> Rollout:
    """Sample `group_size` completions by the student for each prompt of this process's share."""
    own = request(learner, drawn, config, step)
    groups = sampler.sample(own.prompts, own.group_size, own.sampling, own.seed)
    examples = learner.shard(drawn)
    return gather(learner.policy, examples, groups, config.group_size, step, on_policy=True, stop=config.stop)


def request(learner: Learner, drawn: Sequence[Example], config: OnPolicyConfig, step: int) -> Request:
    """The request of this process to its sampler in a step."""
    prompts = [encode_prompt(learner.policy.tokenizer, example.prompt) for example in learner.shard(drawn)]
    sampling = Sampling.of(config)
    return Request(prompts, config.group_size, sampling, step_seed(learner.seed, step, f"sample {learner.rank}"))


def gather(
    policy: Policy,
    examples: Sequence[Example],
    groups: Sequence[Sequence[Sample]],
    group_size: int,
    step: int,
    on_policy: bool,
    stop: Sequence[str] = (),
) -> Rollout:
    """Return the samples of each example's prompt as the rows of a rollout.

    Args:
        policy: Its tokenizer decodes the completions.
        examples: One for each group.
        groups: The samples of each example's prompt.
        group_size: Samples of each group.
        step: The step they are for.
        on_policy: Whether the student drew them.
        stop: Stop strings; a completion's text ends before the first of them.
    """
    samples = [row for group in groups for row in group]
    return Rollout(
        step=step,
        examples=[example for example in examples for _ in range(group_size)],
        samples=samples,
        completions=policy.texts((sample.completion_ids for sample in samples), stop),
        on_policy=[on_policy] * len(samples),
        group_size=group_size,
    )


def verifiable_rewards(rollout: Rollout, domains: Mapping[str, Domain]) -> list[float]:
    """The verifiable reward of each row, in [0, 1]."""
    scores = [0.0] * len(rollout.examples)
    for name in dict.fromkeys(rollout.domains):
        rows = [row for row, domain in enumerate(rollout.domains) if domain == name]
        found = domains[name].score_all([(rollout.examples[row], rollout.completions[row]) for row in rows])
        for row, value in zip(rows, found, strict=True):
            scores[row] = value
    return scores
