"""A sampler's settings and its completions."""

from dataclasses import dataclass

from torch import Tensor

from stages.config.on_policy import OnPolicyConfig


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling.

    Attributes:
        max_new_tokens: Longest completion.
        temperature: Divides the logits; 0 is greedy.
        top_p: Only the likeliest tokens whose probabilities reach this sum can be drawn.
        max_rows: Completions sampled together; more prompts are split into several batches.
        stop: Texts that end a completion, besides the stop tokens; the token that completes such a text is the last.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_rows: int = 512
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: OnPolicyConfig) -> "Sampling":
        """The sampling settings of an on-policy stage."""
        return cls(config.max_new_tokens, config.temperature, config.top_p, stop=config.stop)


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt.

    Attributes:
        prompt_ids: The prompt.
        completion_ids: The completion; if it is finished, its last token is a stop token or completes a stop string.
        logprobs_N: Log-probability of each completion token under the sampling policy at its temperature, before top-p
            and before barred ids are excluded. If they were included, the importance ratio would fall below 1 although
            sampler and trainer are one policy.
        finished: Whether it ended within `max_new_tokens`, by a stop token or a stop string.
        version: The version of the weights that drew it: the batches they had been updated on.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs_N: Tensor
    finished: bool
    version: int = 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and completion."""
        return [*self.prompt_ids, *self.completion_ids]


@dataclass(frozen=True)
class Gap:
    """The gap between a sampler and the trainer on some tokens, both with the same weights.

    Attributes:
        total: Sum over the tokens of |log-probability by the trainer − by the sampler|, in nats.
        tokens: Number of tokens; 0 if none could be measured.
        most: The largest gap of a token; −1 without tokens.
    """

    total: float
    tokens: int
    most: float
