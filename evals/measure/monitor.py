"""A learning curve: greedy held-out scores of the student while it trains.

The examples, the sampler and the scorer are those of the evaluation, so the curve ends where the tables begin if stage
and evaluation have one `dtype`; the weights do not depend on it. With several processes each computes the same scores.
"""

import statistics
from collections.abc import Mapping, Sequence

from base.errors import UserError
from evals.comparison.scores import EXAMPLES_SEED
from experts.domain import HELD_OUT, Domain, Example
from stages.config.on_policy import MonitorConfig
from stages.model.policy import Policy
from stages.rows.chat import encode_prompt
from stages.sampling.sampler import sample
from stages.sampling.samples import Sampling


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

    def __call__(self, policy: Policy, step: int) -> dict[str, float]:
        """Measure the policy when a measurement is due: before the first step and after every `every` steps.

        Args:
            policy: The student, in eval mode.
            step: Steps done.

        Returns:
            `score/DOMAIN` -> mean greedy score in [0, 1]; empty if none is due.
        """
        if step % self.every:
            return {}
        if not self._prompts:
            self._prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in self._examples]
        pairs: dict[str, list[tuple[Example, str]]] = {}
        groups = sample(policy, self._prompts, 1, self.sampling, 0)
        completions = policy.texts((drawn.completion_ids for (drawn,) in groups), self.sampling.stop)
        for example, completion in zip(self._examples, completions, strict=True):
            pairs.setdefault(example.domain, []).append((example, completion))
        return {f"score/{name}": statistics.fmean(self.domains[name].score_all(rows)) for name, rows in pairs.items()}
