"""A learning curve: greedy held-out scores of the student while it trains.

The examples and the scorer are those of the evaluation, so the curve ends where the tables begin if stage and
evaluation have one `dtype` and one sampler; the weights do not depend on it. The completions come from the stage's own
sampler, be it transformers or vLLM. With several processes each samples and scores its share of the examples.
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
from stages.sampling.sampler import Sampler, TransformersSampler
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
        self.examples: list[Example] = []
        for name in sorted(domains):
            drawn = domains[name].draw_up_to(config.examples, HELD_OUT, EXAMPLES_SEED)
            if not drawn:
                raise UserError(f"domains.{name}: no {HELD_OUT} examples")
            self.examples += drawn
        self._prompts: list[list[int]] = []

    def due(self, step: int) -> bool:
        """Whether a measurement is due: before the first step and after every `every` steps."""
        return step % self.every == 0

    def fits(self, policy: Policy, context: int | None) -> bool:
        """Whether a sampler with a context of so many tokens takes all prompts; one without has the model's own."""
        longest = max(len(prompt) for prompt in self._encoded(policy))
        return context is None or longest + self.sampling.max_new_tokens <= context

    def __call__(self, policy: Policy, step: int, sampler: Sampler | None = None) -> dict[str, float]:
        """Measure the policy when a measurement is due; all processes must call it.

        Args:
            policy: The student, in eval mode.
            step: Steps done.
            sampler: Draws the completions, with the policy's weights; the policy's own model when absent.

        Returns:
            `score/DOMAIN` -> mean greedy score in [0, 1], the same in every process; empty if none is due.
        """
        if not self.due(step):
            return {}
        mine = list(range(*_share(len(self.examples))))
        scores = dict(_gathered(self._scores(policy, sampler or TransformersSampler(policy), mine)))
        by_domain: dict[str, list[float]] = {}
        for index, example in enumerate(self.examples):
            by_domain.setdefault(example.domain, []).append(scores[index])
        return {f"score/{name}": statistics.fmean(values) for name, values in by_domain.items()}

    def _encoded(self, policy: Policy) -> list[list[int]]:
        """The prompts as token ids; all processes have all of them."""
        if not self._prompts:
            self._prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in self.examples]
        return self._prompts

    def _scores(self, policy: Policy, sampler: Sampler, mine: Sequence[int]) -> list[Score]:
        """The scores of some examples."""
        prompts = self._encoded(policy)
        # Also without prompts: an engine frees its memory after every request.
        groups = sampler.sample([prompts[index] for index in mine], 1, self.sampling, 0)
        completions = policy.texts((drawn.completion_ids for (drawn,) in groups), self.sampling.stop)
        pairs: dict[str, list[tuple[int, str]]] = {}
        for index, completion in zip(mine, completions, strict=True):
            pairs.setdefault(self.examples[index].domain, []).append((index, completion))
        found: list[Score] = []
        for name, rows in pairs.items():
            values = self.domains[name].score_all([(self.examples[index], text) for index, text in rows])
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
