"""What a hand-over of weights is checked by: names and shapes before it, a probe's log-probabilities after it.

Shape suffixes: N completion tokens.

An engine takes what it is given tensor by tensor, and a load that fails half-way leaves some of each. So a policy is
compared with the engine's own model before a byte is sent, and no number of the engine counts before it has scored a
short row as the trainer's own forward does.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from base.errors import UserError
from stages.config.on_policy import OnPolicyConfig
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import Policy, causal_lm, head_weight
from stages.model.remote_code import options
from stages.rows.chat import encode_prompt
from stages.sampling.agreement import agreement_tolerance, plain_logits
from stages.sampling.sampler import Sample

HEAD = "lm_head.weight"
PROBE_PROMPT, PROBE_TOKENS, PROBE_SEED = "1 + 1 =", 8, 0
# Names shown of tensors that do not fit.
SHOWN = 3

Shapes = Mapping[str, tuple[int, ...]]


def full_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The weights under their checkpoint's names, of a LoRA student its base's, the head always by its own name."""
    model = causal_lm(policy.model)
    yield from ((name, parameter.detach()) for name, parameter in _named(model) if name != HEAD)
    yield HEAD, policy.head_VH.detach()


def weight_shapes(policy: Policy) -> Shapes:
    """Name and shape of each tensor of `full_weights`."""
    return {name: tuple(tensor.shape) for name, tensor in full_weights(policy)}


def shapes_of_config(folder: Path) -> Shapes:
    """Names and shapes of the weights that an engine takes which was started with a folder's `config.json`.

    Raises:
        UserError: the folder has no readable config.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **options())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: the shape of the server's model cannot be read: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in _named(model)}
    return shapes | {HEAD: tuple(head_weight(model).shape)}


def check_shapes(given: Shapes, taken: Shapes, engine: str) -> None:
    """Compare the student's weights with those of an engine's model.

    Args:
        given: The student's.
        taken: The engine's.
        engine: Its name, for the message.

    Raises:
        UserError: a name or a shape differs; names the first ones.
    """
    wrong = [
        f"{name} is {_shape(given.get(name))} in the student and {_shape(taken.get(name))} in the engine"
        for name in [*given, *(name for name in taken if name not in given)]
        if given.get(name) != taken.get(name)
    ]
    if wrong:
        rest = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"{engine} was started for a model of another shape: {'; '.join(wrong[:SHOWN])}{rest}. No weights were "
            f"sent; start it from the checkpoint this stage starts from, as `mopd serve rollout` does"
        )


@dataclass(frozen=True)
class Probe:
    """A short row with the trainer's own log-probabilities of its completion, at temperature 1.

    Attributes:
        tokens: Prompt and completion.
        start: Where the completion begins.
        logprobs: One for each completion token.
        tolerance: Largest mean gap of an engine that has the weights, in nats.
    """

    tokens: list[int]
    start: int
    logprobs: list[float]
    tolerance: float

    @classmethod
    @torch.no_grad()
    def of(cls, policy: Policy, config: OnPolicyConfig) -> "Probe":
        """Draw a row by the policy's plain forward, which no cache and no packing can spoil."""
        prompt = encode_prompt(policy.tokenizer, PROBE_PROMPT) or [policy.eos_id]
        generator, logprobs = torch.Generator().manual_seed(PROBE_SEED), []
        tokens = list(prompt)
        for _ in range(PROBE_TOKENS):
            # The last token stands for the one that is not drawn yet; nothing before it sees it.
            unfinished = Sample(tokens, [policy.eos_id], torch.zeros(1), finished=False)
            logits_NV = plain_logits(policy.model, unfinished, config.dtype)
            drawn_N = torch.multinomial(logits_NV[0].softmax(-1), 1, generator=generator)
            logprobs.append(float(token_logprobs(logits_NV, drawn_N)))
            tokens = [*tokens, int(drawn_N)]
        return cls(tokens, len(prompt), logprobs, agreement_tolerance(config))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Probe":
        """From what `written` gave."""
        return cls(**values)

    def written(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return asdict(self)

    def check(self, scored: list[float], engine: str) -> None:
        """Compare an engine's log-probabilities of the completion.

        Args:
            scored: One for each completion token.
            engine: Its name, for the message.

        Raises:
            UserError: their mean gap is above the tolerance, or one is not a number.
        """
        gaps = [abs(own - other) for own, other in zip(self.logprobs, scored, strict=True)]
        mean = sum(gaps) / len(gaps)
        # What is no number is not below the tolerance either.
        if not mean <= self.tolerance:
            shown = ", ".join(f"{other:.3f} for {own:.3f}" for own, other in zip(self.logprobs, scored, strict=True))
            raise UserError(
                f"{engine} took the weights, but its log-probabilities are {mean:.3g} nats a token from the trainer's "
                f"own forward ({shown}); the tolerance is {self.tolerance:g}. Sample with sampler.backend: "
                f"transformers; a gap of rounding alone can be allowed by preflight_tolerance"
            )


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
