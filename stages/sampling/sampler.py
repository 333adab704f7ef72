"""The `Sampler` protocol, and batched sampling in the trainer's own process: transformers models with a KV cache.

Shape suffixes: B rows still sampling, R room of the cache, L cached length, H hidden, V vocabulary, N completion
tokens.

Each distinct prompt is prefilled once, without padding, and its cache is repeated for the group. Prompts of all domains
share one batch. Rows that have ended are removed from it, so that the cost follows the unfinished rows. A greedy
sampler (`temperature` 0) takes the likeliest token.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from base.errors import UserError
from stages.model.architecture import Masks, context
from stages.model.policy import Policy, causal_lm, scaled
from stages.model.precision import as_factor, head_factor, head_logits, precision
from stages.model.stop_strings import StopStrings
from stages.sampling.cache import prefill
from stages.sampling.draw import draw
from stages.sampling.samples import Gap, Sample, Sampling

# Finished rows are dropped several at a time, because dropping copies the cache.
DROP_SHARE = 0.2


@dataclass(frozen=True)
class Request:
    """A step's request to a sampler: the arguments of `Sampler.sample`."""

    prompts: Sequence[list[int]]
    group_size: int
    sampling: Sampling
    seed: int


class Sampler(Protocol):
    """Draws the student's completions, in this process or elsewhere, with the weights it received last."""

    @property
    def context(self) -> int | None:
        """Tokens of the longest row, prompt and completion; None if only the model limits it."""

    def update_weights(self, policy: Policy, version: int) -> None:
        """Use the policy's weights from now on; `version` counts the batches they have been updated on."""

    def sample(
        self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Arguments, result and errors as for the function `sample`."""

    def drain_log(self) -> list[str]:
        """Return the lines for the log since the last call."""

    def logprob_gap(self) -> Gap | None:
        """The gap to the trainer at the last hand-over; None if the loop measures it on the samples."""

    def close(self) -> None:
        """Free all resources and end all processes of the sampler."""


def parse_logprobs(values: Sequence[float], engine: str) -> Tensor:
    """Check the log-probabilities that another engine reported for its tokens, and return them as a tensor [N].

    Args:
        values: One for each token.
        engine: The engine's name, for the message.

    Raises:
        FloatingPointError: one is not finite: weights or precision of the engine are broken.
    """
    logprobs_N = torch.tensor(values)
    if not bool(logprobs_N.isfinite().all()):
        first = values[int(logprobs_N.isfinite().int().argmin())]
        raise FloatingPointError(f"{engine} gave {first} as a log-probability")
    return logprobs_N


class TransformersSampler:
    """Samples with the trainer's own model, so that no weights need to be copied."""

    context: int | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.version = 0

    def update_weights(self, policy: Policy, version: int) -> None:
        """Sample with this policy from now on."""
        self.policy, self.version = policy, version

    def sample(
        self, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
    ) -> list[list[Sample]]:
        """Arguments, result and errors as for the function `sample`."""
        groups = sample(self.policy, prompts, group_size, sampling, seed)
        return [[dataclasses.replace(drawn, version=self.version) for drawn in group] for group in groups]

    def drain_log(self) -> list[str]:
        """Always empty: there are no servers to report on."""
        return []

    def logprob_gap(self) -> Gap | None:
        """Always None: trainer and sampler are one model."""
        return None

    def close(self) -> None:
        """Do nothing: the model belongs to the trainer."""


def sample(
    policy: Policy, prompts: Sequence[list[int]], group_size: int, sampling: Sampling, seed: int
) -> list[list[Sample]]:
    """Sample a group of completions for each prompt.

    Args:
        policy: Model and tokenizer; the model must be in eval mode.
        prompts: Token ids of each prompt, none empty.
        group_size: Completions of each prompt.
        sampling: How to draw.
        seed: The same seed, prompts and weights give the same completions.

    Returns:
        One list of `group_size` samples per prompt, in order.

    Raises:
        UserError: a prompt plus `max_new_tokens` exceeds the model's context.
    """
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    limit = context(policy.model.config)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} exceed the model's context "
            f"of {limit} tokens; lower max_new_tokens or shorten the domain's prompts"
        )
    generator = torch.Generator(policy.device).manual_seed(seed)
    # Prompts of similar length are batched together, so that a batch has little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups: list[list[Sample]] = [[] for _ in prompts]
    per_batch = max(1, sampling.max_rows // group_size)
    for first in range(0, len(order), per_batch):
        batch = order[first : first + per_batch]
        samples = _Batch(policy, [prompts[i] for i in batch], group_size, sampling, generator).run()
        for position, i in enumerate(batch):
            groups[i] = samples[position * group_size : (position + 1) * group_size]
    return groups


class _Batch:
    """One batch from prefill to the end of its last row."""

    def __init__(
        self,
        policy: Policy,
        prompts: list[list[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        self.policy = policy
        self.prompts = prompts
        self.group_size = group_size
        self.sampling = sampling
        self.generator = generator
        self.decoder = causal_lm(policy.model).get_decoder()
        self.masks = Masks.of(self.decoder.config)
        self.dtype = torch.bfloat16 if policy.dtype == "bfloat16" else policy.head_VH.dtype
        self.head_VH = head_factor(policy.head_VH, self.dtype)
        self.width = max(len(prompt) for prompt in prompts)
        rows = len(prompts) * group_size
        device = policy.device
        self.tokens = torch.full((rows, sampling.max_new_tokens), policy.pad_id, device=device)
        self.logprobs = torch.zeros((rows, sampling.max_new_tokens), device=device)
        self.lengths = torch.full((rows,), sampling.max_new_tokens, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.stops_S = torch.tensor(policy.stop_ids, device=device)
        self.stop = StopStrings(policy.tokenizer, sampling.stop) if sampling.stop else None
        self.barred = torch.tensor(policy.barred_ids, dtype=torch.long, device=device) if policy.barred_ids else None

    def run(self) -> list[Sample]:
        """Sample until every row has ended or is as long as allowed."""
        # The samples are made outside: a tensor created in inference mode cannot be used in a backward pass.
        with torch.inference_mode(), precision(self.policy.device, self.policy.dtype):
            self._decode(*self._prefill())
        return self._samples()

    def _decode(self, logits_BV: Tensor, bias_BR: Tensor, positions_B: Tensor) -> None:
        """Draw and run tokens one after another."""
        alive_B = torch.arange(self.tokens.shape[0], device=self.tokens.device)
        running_B = torch.ones_like(alive_B, dtype=torch.bool)
        left = len(running_B)
        for step in range(self.sampling.max_new_tokens):
            tokens_B, logprobs_B = draw(logits_BV, self.sampling, self.generator, self.barred)
            # Ended rows that are not dropped yet continue; tokens after their end are never read.
            self.tokens[alive_B, step] = tokens_B
            self.logprobs[alive_B, step] = logprobs_B
            ended_B = running_B & torch.isin(tokens_B, self.stops_S)
            if self.stop is not None:
                tails = self.tokens[alive_B, max(0, step + 1 - self.stop.window) : step + 1].tolist()
                ended_B |= running_B & torch.tensor(self.stop.ended(tails), device=tokens_B.device)
            # The device waits for the host once a token, and again where rows end.
            if bool(ended_B.any()):
                rows_E = alive_B[ended_B]
                self.lengths[rows_E] = step + 1
                self.finished[rows_E] = True
                running_B = running_B & ~ended_B
                left = int(running_B.sum())
            if left == 0 or step + 1 == self.sampling.max_new_tokens:
                break
            if left <= (1 - DROP_SHARE) * len(running_B):
                keep = running_B.nonzero().squeeze(1)
                self.cache.batch_select_indices(keep)
                alive_B, running_B, tokens_B = alive_B[keep], running_B[keep], tokens_B[keep]
                bias_BR, positions_B = bias_BR[keep], positions_B[keep]
            logits_BV = self._forward(tokens_B, bias_BR[:, : self.width + step + 1], positions_B)
            positions_B = positions_B + 1

    def _prefill(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run the distinct prompts and repeat the result for their groups.

        Returns:
            Logits [B, V] of the first token, attention bias [B, R] for all later tokens, and the first token's position
            [B].
        """
        # The last token drawn is never run.
        room = self.width + self.sampling.max_new_tokens - 1
        device, dtype, repeat = self.policy.device, self.dtype, self.group_size
        self.cache, hidden_BH = prefill(self.decoder, self.prompts, room, self.policy.pad_id, device, dtype)
        lengths_B = torch.tensor([len(p) for p in self.prompts], device=device)
        padding_BR = torch.arange(room, device=device)[None, :] < (self.width - lengths_B)[:, None]
        bias_BR = torch.zeros(padding_BR.shape, dtype=dtype, device=device)
        bias_BR.masked_fill_(padding_BR, torch.finfo(dtype).min)
        if repeat > 1:
            self.cache.batch_repeat_interleave(repeat)
        return (
            self._logits(hidden_BH).repeat_interleave(repeat, 0),
            bias_BR.repeat_interleave(repeat, 0),
            lengths_B.repeat_interleave(repeat, 0),
        )

    def _forward(self, tokens_B: Tensor, bias_BL: Tensor, positions_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token of each row; the token is added to the cache."""
        output = self.decoder(
            input_ids=tokens_B[:, None],
            attention_mask=self.masks(bias_BL[:, None, None, :]),
            position_ids=positions_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return self._logits(output.last_hidden_state[:, -1])

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        scaled_BH = as_factor(scaled(self.policy.model, hidden_BH), self.policy.dtype)
        return head_logits(scaled_BH, self.head_VH).float()

    def _samples(self) -> list[Sample]:
        tokens, lengths, finished = self.tokens.tolist(), self.lengths.tolist(), self.finished.tolist()
        logprobs = self.logprobs.cpu()
        return [
            Sample(
                prompt_ids=self.prompts[row // self.group_size],
                completion_ids=tokens[row][:length],
                logprobs_N=logprobs[row, :length].clone(),
                finished=finished[row],
            )
            for row, length in enumerate(lengths)
        ]
