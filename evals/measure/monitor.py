"""A learning curve: greedy held-out scores of the student while it trains.

The examples, the sampler and the scorer are those of the evaluation, so the curve ends where the tables begin if stage
and evaluation have one `dtype`; the weights do not depend on it. With several processes each samples and scores its
share of the examples.
"""

import statistics
from collections.abc import Mapping, Sequence

from torch import distributed

from base.errors import UserError
from evals.comparison.scores import EXAMPLES_SEED
from experts.domain import HELD_OUT, Domain, Example
from stages.config.on_policy import MonitorConfig
from stages.model.policy import Policy
from stages.rows.chat import encode_prompt
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling

# A score with the example's index.
Score = tuple[int, float]


class Monitor:
    """Scores the student at intervals; a stage calls it with the policy and the number of steps done."""

    def __init__(
        self, domains: Mapping[str, Domain], config: MonitorConfig, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> None:
        """Draw the examples; prompts are encoded at the first measurement.

        Args:
            domains: The training domains.
            config: When and on how many examples.
            max_new_tokens: Longest completion.
            stop: Texts that end a completion.

        Raises:
            UserError: a domain cannot supply the examples, or has none.
        """
        self.domains = domains
        self.every = config.every
        self.sampling = Sampling(max_new_tokens, temperature=0.0, stop=tuple(stop))
        self._examples: list[Example] = []
        for name in sorted(domains):
            drawn = domains[name].draw_up_to(config.examples, HELD_OUT, EXAMPLES_SEED)
            if not drawn:
                raise UserError(f"domains.{name}: no {HELD_OUT} examples")
            self._examples += drawn
        self._prompts: list[list[int]] = []

    def due(self, step: int) -> bool:
        """Whether a measurement is due: before the first step and after every `every` steps."""
        return step % self.every == 0

    def __call__(self, policy: Policy, step: int) -> dict[str, float]:
        """Measure the policy when a measurement is due; all processes must call it.

        Args:
            policy: The student, in eval mode.
            step: Steps done.

        Returns:
            `score/DOMAIN` -> mean greedy score in [0, 1], the same in every process; empty if none is due.
        """
        if not self.due(step):
            return {}
        if not self._prompts:
            self._prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in self._examples]
        scores = dict(_gathered(self._scores(policy, list(range(*_share(len(self._examples)))))))
        by_domain: dict[str, list[float]] = {}
        for index, example in enumerate(self._examples):
            by_domain.setdefault(example.domain, []).append(scores[index])
        return {f"score/{name}": statistics.fmean(values) for name, values in by_domain.items()}

    def _scores(self, policy: Policy, mine: Sequence[int]) -> list[Score]:
        """The scores of some examples."""
        if not mine:
            return []
        groups = sample(policy, [self._prompts[index] for index in mine], 1, self.sampling, 0)
        completions = policy.texts((drawn.completion_ids for (drawn,) in groups), self.sampling.stop)
        pairs: dict[str, list[tuple[int, str]]] = {}
        for index, completion in zip(mine, completions, strict=True):
            pairs.setdefault(self._examples[index].domain, []).append((index, completion))
        found: list[Score] = []
        for name, rows in pairs.items():
            values = self.domains[name].score_all([(self._examples[index], text) for index, text in rows])
            found += zip((index for index, _ in rows), values, strict=True)
        return found


def _share(count: int) -> tuple[int, int, int]:
    """This process's share of so many examples, as the arguments of `range`."""
    if not distributed.is_initialized():
        return 0, count, 1
    return distributed.get_rank(), count, distributed.get_world_size()


def _gathered(scores: list[Score]) -> list[Score]:
    """The scores of all processes."""
    if not distributed.is_initialized():
        return scores
    parts: list[list[Score]] = [[]] * distributed.get_world_size()
    distributed.all_gather_object(parts, scores)
    return [score for part in parts for score in part]
