"""Checks of a hand-over of weights: names and shapes before it, a probe's log-probabilities after it.

Shape suffixes: N completion tokens.

An engine loads weights tensor by tensor, and a load that fails half-way leaves a mixture of two versions. So the policy
is compared with the engine's model before any byte is sent, and the engine's results are used only after it has scored
a short row as the trainer's own forward pass does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from base.errors import UserError
from stages.config.on_policy import OnPolicyConfig
from stages.learner.sharding import whole
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import Policy, causal_lm, head_weight
from stages.rows.chat import encode_prompt
from stages.sampling.agreement import agreement_tolerance, plain_logits
from stages.sampling.samples import Sample

HEAD = "lm_head.weight"
# Parts of the names that peft gives to an adapter's parameters: those of any LoRA adapter, and of the policy's own.
ADAPTER, OWN_ADAPTER = "lora_", "default"
PROBE_PROMPT, PROBE_TOKENS, PROBE_SEED = "1 + 1 =", 8, 0
# Number of tensors that a message names.
SHOWN = 3

Shapes = Mapping[str, tuple[int, ...]]


def full_weights(policy: Policy, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights under their names in the checkpoint, one after another; for a LoRA student its base's.

    The head always has its own name, also if it is tied to the embedding. Each tensor is gathered and converted when it
    is its turn, so that only one exists a second time. If the policy is sharded, all processes must iterate.

    Args:
        policy: The student.
        dtype: The engine's number type, see `sent_as`; the tensors' own if absent.
    """
    for name, tensor in _own_weights(policy):
        yield name, whole(tensor if dtype is None else tensor.to(sent_as(tensor.shape, dtype)))


def sent_as(shape: Sequence[int], dtype: torch.dtype) -> torch.dtype:
    """The number type in which a tensor is handed over: the engine's for matrices, float32 for vectors, which are small
    and which engines may keep in float32."""
    return dtype if len(shape) > 1 else torch.float32


def adapter_weights(policy: Policy) -> dict[str, Tensor]:
    """The parameters of the policy's own adapter by name; if the policy is sharded, they are gathered, and all
    processes must call it. Not `state_dict()`, for which FSDP shards gathered weights again."""
    return {
        name: whole(p.detach())
        for name, p in policy.model.named_parameters()
        if ADAPTER in name and OWN_ADAPTER in name.split(".")
    }


def weight_shapes(policy: Policy) -> Shapes:
    """Name and shape of each tensor of `full_weights`."""
    return {name: tuple(tensor.shape) for name, tensor in _own_weights(policy)}


def shapes_of_config(folder: Path, remote_code: bool) -> Shapes:
    """Names and shapes of the weights of an engine that was started with a folder's `config.json`.

    Raises:
        UserError: the folder has no readable config.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot read the config of the server's model: {error}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in _named(model)}
    return shapes | {HEAD: tuple(head_weight(model).shape)}


def check_shapes(student: Shapes, engine: Shapes, engine_name: str) -> None:
    """Compare the student's weights with those of an engine's model.

    Args:
        student: The student's shapes.
        engine: The engine's shapes.
        engine_name: The engine's name, for the message.

    Raises:
        UserError: a name or a shape differs; the message shows the first differences.
    """
    wrong = [
        f"{name} is {_shape(student.get(name))} in the student and {_shape(engine.get(name))} in the engine"
        for name in [*student, *(name for name in engine if name not in student)]
        if student.get(name) != engine.get(name)
    ]
    if wrong:
        rest = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"{engine_name} was started for a model of another shape: {'; '.join(wrong[:SHOWN])}{rest}. No weights "
            f"were sent; start it from the checkpoint this stage starts from, as `mopd serve rollout` does"
        )


@dataclass(frozen=True)
class Probe:
    """A short row with the trainer's own log-probabilities of its completion, at temperature 1.

    Attributes:
        tokens: Prompt and completion.
        start: Where the completion begins.
        logprobs: One for each completion token.
        tolerance: Largest accepted mean gap of an engine with the same weights, in nats.
    """

    tokens: list[int]
    start: int
    logprobs: list[float]
    tolerance: float

    @classmethod
    @torch.no_grad()
    def of(cls, policy: Policy, config: OnPolicyConfig) -> "Probe":
        """Draw a row with the policy's plain forward pass, without cache and packing."""
        prompt = encode_prompt(policy.tokenizer, PROBE_PROMPT) or [policy.eos_id]
        generator, logprobs = torch.Generator().manual_seed(PROBE_SEED), []
        tokens = list(prompt)
        for _ in range(PROBE_TOKENS):
            # The last token is a placeholder for the one to draw; causality hides it from all tokens before.
            unfinished = Sample(tokens, [policy.eos_id], torch.zeros(1), finished=False)
            logits_NV = plain_logits(policy.model, unfinished, config.dtype)
            drawn_N = torch.multinomial(logits_NV[0].softmax(-1), 1, generator=generator)
            logprobs.append(float(token_logprobs(logits_NV, drawn_N)))
            tokens = [*tokens, int(drawn_N)]
        return cls(tokens, len(prompt), logprobs, agreement_tolerance(config))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Probe":
        """The probe from the values of `to_json`."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The probe as JSON-serialisable values."""
        return asdict(self)

    def check(self, scored: list[float], engine: str, key: str = "sampler.backend") -> None:
        """Compare an engine's log-probabilities of the completion with the trainer's.

        Args:
            scored: One for each completion token.
            engine: The engine's name, for the message.
            key: The run file's key that asks for vLLM, for the message.

        Raises:
            UserError: the mean gap is above the tolerance, or a value is not a number.
        """
        gaps = [abs(own - other) for own, other in zip(self.logprobs, scored, strict=True)]
        mean = sum(gaps) / len(gaps)
        # Not `mean > tolerance`, so that NaN fails too.
        if not mean <= self.tolerance:
            shown = ", ".join(f"{other:.3f} for {own:.3f}" for own, other in zip(self.logprobs, scored, strict=True))
            raise UserError(
                f"{engine} took the weights, but its log-probabilities are {mean:.3g} nats a token from the trainer's "
                f"own forward ({shown}); the tolerance is {self.tolerance:g}. Sample with {key}: transformers; for a "
                f"stage a gap of rounding alone can be allowed by preflight_tolerance"
            )


def _own_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    model = causal_lm(policy.model)
    yield from ((name, parameter.detach()) for name, parameter in _named(model) if name != HEAD)
    yield HEAD, policy.head_VH.detach()


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
