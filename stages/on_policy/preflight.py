"""What a merge checks before its first step: the sampler and every teacher's scores agree with a plain forward pass.

Shape suffixes: N completion tokens.

The loss compares log-probabilities that come by different ways: from the sampler's cache, from packed rows, from
hidden states and a head in chunks, from adapters on a shared base. Here each way is measured against the plainest one
there is, the model's own forward of one unpadded row. A first loss that is off by an order of magnitude is how such a
disagreement is found elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from experts.domain import Example
from experts.errors import UserError
from stages.core.chat import encode_prompt
from stages.core.policy import Policy
from stages.core.update import Row
from stages.on_policy.distill_config import DistillConfig
from stages.on_policy.losses import token_logprobs
from stages.on_policy.mismatch import plain_logits
from stages.on_policy.sampler import Sample, Sampler, Sampling
from stages.on_policy.teachers import REFERENCE, Routed, TeacherPool

PROMPTS_A_DOMAIN = 2
LONGEST = 32
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}


@torch.no_grad()
def preflight(
    policy: Policy,
    sampler: Sampler,
    pool: TeacherPool,
    examples: Mapping[str, Sequence[Example]],
    config: DistillConfig,
    note: Callable[[str], None],
) -> None:
    """Sample a few completions of each domain and score them both ways.

    Args:
        policy: The student, in eval mode.
        sampler: Draws its completions.
        pool: The teachers, whose tokenizers and vocabularies have been compared.
        examples: Training examples of each domain.
        config: The merge's config; `preflight_tolerance` in nats.
        note: Takes the line that tells the tolerance and the largest gaps.

    Raises:
        UserError: a gap above the tolerance; shows the first such token.
    """
    tolerance = config.preflight_tolerance or TOLERANCES[config.dtype]
    chosen = [example for drawn in examples.values() for example in drawn[:PROMPTS_A_DOMAIN]]
    prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in chosen]
    sampling = Sampling(min(config.max_new_tokens, LONGEST), config.temperature, config.top_p)
    sampler.follow(policy, 0)
    samples = [group[0] for group in sampler.sample(prompts, 1, sampling, 0)]
    gaps = {"sampler and trainer": 0.0, "teachers": 0.0}
    for example, drawn in zip(chosen, samples, strict=True):
        own_N = token_logprobs(plain_logits(policy.model, drawn, config.dtype) / config.temperature, _targets(drawn))
        gap = _compare(policy, example.domain, drawn, ("the sampler", drawn.logprobs_N), own_N, tolerance)
        gaps["sampler and trainer"] = max(gaps["sampler and trainer"], gap)
    rows = [Row(drawn.tokens, len(drawn.prompt_ids), torch.ones(len(drawn.completion_ids))) for drawn in samples]
    for domain in pool.routes:
        mine = [i for i, example in enumerate(chosen) if domain in (example.domain, REFERENCE)]
        scores = pool.score([rows[i] for i in mine], [domain] * len(mine))
        for position, i in enumerate(mine):
            drawn = samples[i]
            tokens_N = torch.tensor(drawn.completion_ids, device=policy.device)
            scored_N = scores.logprobs([position], tokens_N, config.temperature).cpu()
            gap = _compare(
                policy,
                domain,
                drawn,
                (f"{_names(pool, domain)}, scored as a teacher,", scored_N),
                _pooled(pool, domain, drawn, config),
                tolerance,
            )
            gaps["teachers"] = max(gaps["teachers"], gap)
    told = ", ".join(f"{who} agree within {gap:.1e}" for who, gap in gaps.items())
    note(f"preflight: {told} nats (tolerance {tolerance:g})")


def _pooled(pool: TeacherPool, domain: str, drawn: Sample, config: DistillConfig) -> Tensor:
    """Log-probabilities [N] of a completion under the geometric mean of a domain's teachers."""
    total = sum(routed.weight for routed in pool.routes[domain])
    parts = [routed.weight / total * _taught(pool, routed, drawn, config) for routed in pool.routes[domain]]
    return token_logprobs(torch.stack(parts).sum(0) / config.temperature, _targets(drawn))


def _taught(pool: TeacherPool, routed: Routed, drawn: Sample, config: DistillConfig) -> Tensor:
    with pool.residents.wearing(routed.teacher) as model:
        return plain_logits(model, drawn, config.dtype)


def _targets(drawn: Sample) -> Tensor:
    return torch.tensor(drawn.completion_ids)


def _names(pool: TeacherPool, domain: str) -> str:
    return " and ".join(routed.teacher.name for routed in pool.routes[domain])


def _compare(
    policy: Policy, domain: str, drawn: Sample, scored: tuple[str, Tensor], plain_N: Tensor, tolerance: float
) -> float:
    """The largest gap; above the tolerance (or where one is not a number) an error that shows the first."""
    who, scored_N = scored
    gap_N = (scored_N.cpu() - plain_N).abs()
    wrong_N = ~(gap_N <= tolerance)
    if not bool(wrong_N.any()):
        return float(gap_N.max())
    first = int(wrong_N.nonzero()[0])
    token = drawn.completion_ids[first]
    raise UserError(
        f"merge: preflight, domain '{domain}': {who} gives completion token {first} "
        f"({policy.tokenizer.decode([token])!r}, id {token}) the log-probability {float(scored_N[first]):.4f}, the "
        f"model's own forward pass {float(plain_N[first]):.4f}; the tolerance is {tolerance:g}. The two must be one "
        f"model in one precision; a gap of rounding alone can be allowed by merge.preflight_tolerance"
    )
