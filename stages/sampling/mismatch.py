"""How far sampler and trainer are apart: they compute the same policy by different ways, and never exactly agree.

Measured on the student's own tokens in the forward pass of a rollout's first update, which every step makes anyway.

Shape suffixes: B rows, T tokens, N completion tokens of some rows laid end to end, C those of one chunk, H hidden,
V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from stages.config.on_policy import OnPolicyConfig
from stages.losses.chunked import TokenLoss
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import HiddenStates, head_weight
from stages.on_policy.rollout import Rollout
from stages.sampling.sampler import Sample

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}


def agreement_tolerance(config: OnPolicyConfig) -> float:
    """Largest gap between two forwards of one model that counts as rounding, in nats."""
    return config.preflight_tolerance or TOLERANCES[config.dtype]


def hands_over(config: OnPolicyConfig) -> bool:
    """Whether the sampler has weights of its own, which it is handed."""
    return config.sampler.backend in ("vllm", "vllm_server")


def may_differ(config: OnPolicyConfig) -> bool:
    """Whether sampler and trainer compute in ways that differ by more than rounding."""
    return hands_over(config) or config.dtype != "float32"


def with_mismatch(
    objective: Callable[..., TokenLoss], rollout: Rollout, temperature: float, rows: list[int]
) -> TokenLoss:
    """The objective of some rows, which also tells how far the trainer is from the sampler on the student's tokens.

    `mismatch` where both have the same weights; `drift`, which holds what the updates since have moved as well, where
    the sampler's are older.
    """
    inner = objective(rows)
    cpu = torch.device("cpu")
    tokens_N, sampler_N = rollout.tokens(rows, cpu), rollout.logprobs(rows, cpu)
    stale = [rollout.own[row] and rollout.staleness(row) > 0 for row in rows]
    fresh = [rollout.own[row] and not old for row, old in zip(rows, stale, strict=True)]
    told = {"mismatch": fresh, "drift": stale}
    measured = {
        name: sampler_N.masked_fill(~_by_token(rollout, rows, which), torch.nan)
        for name, which in told.items()
        if any(which)
    }

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        losses_C, metrics = inner(logits_CV, part)
        with torch.no_grad():
            here_C = tokens_N[part].to(logits_CV.device)
            trainer_C = token_logprobs(logits_CV if temperature == 1.0 else logits_CV / temperature, here_C)
            gaps = {name: (trainer_C - their_N[part].to(trainer_C.device)).abs() for name, their_N in measured.items()}
            return losses_C, {**metrics, **gaps}

    return token_loss


@torch.no_grad()
def plain_logits(model: PreTrainedModel | PeftModel, drawn: Sample, dtype: str) -> Tensor:
    """Logits [N, V] of a completion by the model's own forward of that row alone, in the trainer's precision."""
    head_VH = head_weight(model)
    tokens_BT = torch.tensor([drawn.tokens], device=head_VH.device)
    with torch.autocast(head_VH.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_TH = HiddenStates(model)(tokens_BT)[0, len(drawn.prompt_ids) - 1 : -1]
    return (hidden_TH.float() @ head_VH.float().T).cpu()


def _by_token(rollout: Rollout, rows: Sequence[int], which: Sequence[bool]) -> Tensor:
    """A row's answer for each of its completion tokens [N]."""
    lengths = [len(rollout.samples[row].completion_ids) for row in rows]
    return torch.tensor(which).repeat_interleave(torch.tensor(lengths))


def largest(mismatch: Mapping[int, Tensor]) -> float:
    """The largest gap of all rows' tokens; −1 where none was measured."""
    known = [part_N[~part_N.isnan()] for part_N in mismatch.values()]
    return max((float(part_N.max()) for part_N in known if len(part_N)), default=-1.0)
