"""Completions that the student did not write: the routed teacher's own, or the domain's gold answers.

They go through the same loop and the same loss as the student's own samples, so that a sweep of the on-policy
fraction changes only the origin of the data (GKD, Agarwal et al. 2024).
"""

import random
from collections.abc import Mapping, Sequence

import torch

from experts.domain import Domain, Example
from stages.config.distill import DistillConfig
from stages.learner.training import Learner, step_seed
from stages.learner.update import Row
from stages.model.policy import Policy
from stages.on_policy.rollout import Rollout, gather
from stages.rows.chat import encode_demonstration, encode_prompt
from stages.sampling.sampler import sample
from stages.sampling.samples import Sample, Sampling
from stages.teachers.scoring import TeacherPool


class TeacherWriter:
    """Samples each prompt's completions from the teacher of its domain.

    The completions depend on the seed and the step alone, never on the student.
    """

    def __init__(self, pool: TeacherPool, config: DistillConfig, learner: Learner) -> None:
        self.pool = pool
        self.config = config
        self.learner = learner

    def write(self, drawn: Sequence[Example], step: int) -> Rollout:
        """A group of completions for each prompt of this process's share."""
        policy, config = self.learner.policy, self.config
        examples = sorted(self.learner.shard(drawn), key=lambda example: example.domain)
        groups: list[list[Sample]] = []
        sampling = Sampling.of(config)
        for domain in sorted({example.domain for example in examples}):
            prompts = [encode_prompt(policy.tokenizer, e.prompt) for e in examples if e.domain == domain]
            seed = step_seed(self.learner.seed, step, f"teacher {domain} {self.learner.rank}")
            groups += self._answers(domain, prompts, sampling, seed)
        return gather(policy, examples, groups, config.group_size, step, on_policy=False, stop=config.stop)

    def _answers(self, domain: str, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[Sample]]:
        with self.pool.teaching(domain) as teacher:
            return sample(teacher, prompts, self.config.group_size, sampling, seed)


class DatasetWriter:
    """Uses the domain's gold completion of each prompt; its log-probabilities are NaN, since no policy drew it."""

    def __init__(self, domains: Mapping[str, Domain], config: DistillConfig, learner: Learner) -> None:
        self.domains = domains
        self.config = config
        self.learner = learner

    def write(self, drawn: Sequence[Example], step: int) -> Rollout:
        """The gold completion of each prompt of this process's share, cut at `max_new_tokens`."""
        policy, limit = self.learner.policy, self.config.max_new_tokens
        examples = self.learner.shard(drawn)
        groups = []
        for example in examples:
            prompt_ids, answer_ids = gold(policy, self.domains, example)
            kept = answer_ids[:limit]
            unknown_N = torch.full((len(kept),), torch.nan)
            groups.append([Sample(prompt_ids, kept, unknown_N, finished=len(answer_ids) <= limit)])
        return gather(policy, examples, groups, 1, step, on_policy=False)


class GoldenRows:
    """Gold answers learned by cross-entropy in addition to the teachers' signal, as a share of the loss.

    Args:
        examples: Training examples of each domain.
        domains: The domains, which provide the demonstrations.
        config: The merge's config.
        learner: The student.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        domains: Mapping[str, Domain],
        config: DistillConfig,
        learner: Learner,
    ) -> None:
        self.examples = [example for drawn in examples.values() for example in drawn]
        self.domains = domains
        self.learner = learner
        self.share = config.objective.golden_share
        self.per_step = max(1, round(self.share * config.prompts_per_step * config.group_size)) if self.share else 0

    def step(self, step: int) -> list[Row]:
        """This process's rows of a step; over all processes their weights sum to the share."""
        rng = random.Random(step_seed(self.learner.seed, step, "golden"))
        drawn = rng.sample(self.examples, min(self.per_step, len(self.examples)))
        pairs = [gold(self.learner.policy, self.domains, example) for example in drawn]
        total = sum(len(answer_ids) for _, answer_ids in pairs)
        return [
            Row([*prompt_ids, *answer_ids], len(prompt_ids), torch.full((len(answer_ids),), self.share / total))
            for prompt_ids, answer_ids in self.learner.shard(pairs)
        ]


def gold(policy: Policy, domains: Mapping[str, Domain], example: Example) -> tuple[list[int], list[int]]:
    """Token ids of an example's prompt and of its gold completion, with the token that ends it."""
    rng = random.Random(example.id)
    text = domains[example.domain].demonstration(example, rng, rough=False)
    return encode_demonstration(policy.tokenizer, example.prompt, text)
