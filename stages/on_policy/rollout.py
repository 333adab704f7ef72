"""What one step of the on-policy loop works on: prompts drawn by the domain mixture and the student's completions."""

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
from stages.sampling.sampler import Request, Sample, Sampler, Sampling


@dataclass(frozen=True)
class Rollout:
    """The samples of one step, the student's own but for those a config asks to be written elsewhere; rows of a group
    stand together.

    Attributes:
        step: Counts from 1.
        examples: The example of each row.
        samples: The completion of each row.
        completions: Its text.
        own: Whether the student drew it.
        group_size: Rows of one prompt.
    """

    step: int
    examples: list[Example]
    samples: list[Sample]
    completions: list[str]
    own: list[bool]
    group_size: int

    @property
    def domains(self) -> list[str]:
        """The domain of each row."""
        return [example.domain for example in self.examples]

    def __add__(self, other: "Rollout") -> "Rollout":
        """Both steps' rows, these first."""
        return Rollout(
            self.step,
            self.examples + other.examples,
            self.samples + other.samples,
            self.completions + other.completions,
            self.own + other.own,
            self.group_size,
        )

    def staleness(self, row: int) -> int:
        """Batches the student had been updated on since the weights that drew a row."""
        return self.step - 1 - self.samples[row].version

    def fresh(self, most: int) -> "Rollout":
        """The groups none of whose rows has a greater staleness; completions that the student did not draw have
        none."""
        groups = [range(first, first + self.group_size) for first in range(0, len(self.samples), self.group_size)]
        kept = [
            row for group in groups if all(not self.own[i] or self.staleness(i) <= most for i in group) for row in group
        ]
        return Rollout(
            self.step,
            [self.examples[row] for row in kept],
            [self.samples[row] for row in kept],
            [self.completions[row] for row in kept],
            [self.own[row] for row in kept],
            self.group_size,
        )

    def tokens(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Completion tokens [N] of the rows, laid end to end."""
        return torch.tensor([token for row in rows for token in self.samples[row].completion_ids], device=device)

    def logprobs(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The log-probabilities [N] of those tokens under the policy that drew them; NaN where nobody drew them."""
        return torch.cat([self.samples[row].logprobs_N for row in rows]).to(device)


class PromptMixture:
    """Training prompts by domain, each domain an endless shuffled stream; every step takes the same share of each.

    Args:
        examples: Training examples of each domain.
        per_step: Prompts of one step, over all domains.
        weights: Share of a domain relative to 1.
        seed: Decides the order.

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
        """The prompts of a step in two parts, `fraction` of each domain's in the first over the steps so far."""
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
    """Items `first` to `first + count` of the endless stream, without walking the epochs before."""
    epoch, offset = divmod(first, len(items))
    return list(itertools.islice(epochs(items, seed, epoch), offset, offset + count))


def roll_out(
    learner: Learner, sampler: Sampler, drawn: Sequence[Example], config: OnPolicyConfig, step: int
) -> Rollout:
    """Let the student answer each prompt of this process's share `group_size` times."""
    asked = request(learner, drawn, config, step)
    groups = sampler.sample(asked.prompts, asked.group_size, asked.sampling, asked.seed)
    return gather(learner.policy, learner.shard(drawn), groups, config.group_size, step, own=True, stop=config.stop)


def request(learner: Learner, drawn: Sequence[Example], config: OnPolicyConfig, step: int) -> Request:
    """What this process asks its sampler for in a step."""
    prompts = [encode_prompt(learner.policy.tokenizer, example.prompt) for example in learner.shard(drawn)]
    sampling = Sampling.of(config)
    return Request(prompts, config.group_size, sampling, step_seed(learner.seed, step, f"sample {learner.rank}"))


def gather(
    policy: Policy,
    examples: Sequence[Example],
    groups: Sequence[Sequence[Sample]],
    group_size: int,
    step: int,
    own: bool,
    stop: Sequence[str] = (),
) -> Rollout:
    """Lay the samples of each example's prompt out as rows.

    Args:
        policy: Whose tokens they are.
        examples: One for each group.
        groups: The samples of each example's prompt.
        group_size: Of each group.
        step: The step they are for.
        own: Whether the student drew them.
        stop: Texts before which a completion's text ends.
    """
    samples = [row for group in groups for row in group]
    return Rollout(
        step=step,
        examples=[example for example in examples for _ in range(group_size)],
        samples=samples,
        completions=policy.texts((sample.completion_ids for sample in samples), stop),
        own=[own] * len(samples),
        group_size=group_size,
    )


def score(rollout: Rollout, domains: Mapping[str, Domain]) -> list[float]:
    """The verifiable reward of each row, in [0, 1]."""
    scores = [0.0] * len(rollout.examples)
    for name in dict.fromkeys(rollout.domains):
        rows = [row for row, domain in enumerate(rollout.domains) if domain == name]
        found = domains[name].score_all([(rollout.examples[row], rollout.completions[row]) for row in rows])
        for row, value in zip(rows, found, strict=True):
            scores[row] = value
    return scores
