"""Preflight checks of an on-policy stage: the sampler, and in a merge every teacher, agree with a plain forward pass.

The sampler is checked before the first step, and again once it has received weights that an update has changed.

Shape suffixes: N completion tokens.

The loss compares log-probabilities that are computed in different ways: with the sampler's cache, with packed rows,
from hidden states and a head in chunks, with adapters on a shared base. Each way is compared here with the simplest
one, the model's own forward pass of one unpadded row. Without this check a disagreement would only show as a first loss
that is wrong by an order of magnitude.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base.errors import UserError
from experts.domain import Example
from stages.config.distill import DistillConfig
from stages.config.on_policy import OnPolicyConfig
from stages.learner.update import Row
from stages.losses.log_probabilities import token_logprobs
from stages.model.policy import Policy
from stages.rows.chat import encode_prompt
from stages.sampling.agreement import agreement_tolerance, plain_logits
from stages.sampling.sampler import Sampler
from stages.sampling.samples import Sample, Sampling
from stages.teachers.scoring import REFERENCE, Routed, TeacherPool

PROMPTS_A_DOMAIN = 2
TEACHERS, SERVERS = "teachers", "teachers' servers, asked for rows together and alone,"
LONGEST = 32
TRANSFORMERS = "transformers"
OWN_FORWARD, ALONE = "the model's own forward pass", "the teacher's server for this row alone"


@dataclass(frozen=True)
class SamplerCheck:
    """The sampler's preflight of one stage.

    Attributes:
        name: The stage, for messages.
        policy: The student, in eval mode.
        sampler: Draws its completions.
        examples: Training examples of each domain.
        config: The stage's config; `preflight_tolerance` in nats.
    """

    name: str
    policy: Policy
    sampler: Sampler
    examples: Mapping[str, Sequence[Example]]
    config: OnPolicyConfig

    def start(self) -> str:
        """Send the weights to the sampler and compare, before the first step; result and errors as for `again`."""
        self.sampler.update_weights(self.policy, 0)
        return self._line("")

    def again(self) -> str:
        """Compare once the sampler has received weights that an update has changed.

        Returns:
            A line for the log, with the largest gap and the tolerance.

        Raises:
            UserError: a gap is above the tolerance; the message shows the first such token.
        """
        return self._line(" after the first update")

    @torch.no_grad()
    def draw(self) -> tuple[list[Example], list[Sample], float]:
        """Examples, their completions by the sampler, and the largest gap; errors as for `again`."""
        config, policy = self.config, self.policy
        chosen = [example for drawn in self.examples.values() for example in drawn[:PROMPTS_A_DOMAIN]]
        prompts = [encode_prompt(policy.tokenizer, example.prompt) for example in chosen]
        sampling = dataclasses.replace(Sampling.of(config), max_new_tokens=min(config.max_new_tokens, LONGEST))
        samples = [group[0] for group in self.sampler.sample(prompts, 1, sampling, 0)]
        gaps = [0.0]
        for example, drawn in zip(chosen, samples, strict=True):
            logits_NV = plain_logits(policy.model, drawn, config.dtype) / config.temperature
            own_N = token_logprobs(logits_NV, _targets(drawn))
            gaps.append(self.compare(example.domain, drawn, ("the sampler", drawn.logprobs_N), own_N))
        return chosen, samples, max(gaps)

    def compare(
        self, domain: str, drawn: Sample, scored: tuple[str, Tensor], plain_N: Tensor, plain: str = OWN_FORWARD
    ) -> float:
        """Return the largest gap between what scored a completion and `plain`.

        Raises:
            UserError: a gap is above the tolerance, or not a number; the message shows the first such token.
        """
        who, scored_N = scored
        tolerance = agreement_tolerance(self.config)
        gap_N = (scored_N.cpu() - plain_N).abs()
        wrong_N = ~(gap_N <= tolerance)
        if not bool(wrong_N.any()):
            return float(gap_N.max())
        first = int(wrong_N.nonzero()[0])
        token, theirs, own = drawn.completion_ids[first], float(scored_N[first]), float(plain_N[first])
        backend = self.config.sampler.backend or TRANSFORMERS
        other = "" if backend == TRANSFORMERS else f"sample with sampler.backend: {TRANSFORMERS}; "
        raise UserError(
            f"{self.name}: preflight, domain '{domain}': {who} gives completion token {first} "
            f"({self.policy.tokenizer.decode([token])!r}, id {token}) the log-probability {theirs:.4f}, "
            f"{plain} {own:.4f}: a gap of {abs(theirs - own):.3g} nats, above the tolerance of "
            f"{tolerance:g}. The two must be one model in one precision; the sampler is {backend}; {other}a gap of "
            f"rounding alone can be allowed by preflight_tolerance"
        )

    def _line(self, when: str) -> str:
        gap, tolerance = self.draw()[2], agreement_tolerance(self.config)
        return f"preflight{when}: sampler and trainer agree within {gap:.1e} nats (tolerance {tolerance:g})"


@torch.no_grad()
def preflight(check: SamplerCheck, pool: TeacherPool, config: DistillConfig, note: Callable[[str], None]) -> None:
    """Sample a few completions of each domain and score them both ways, as the student and as its teachers do.

    A teacher that servers score is not loaded here; its servers score the rows together and each row alone.

    Args:
        check: The student, its sampler and examples.
        pool: The teachers, whose tokenizers and vocabularies have been compared.
        config: The merge's.
        note: Called with the line that gives the tolerance and the largest gaps.

    Raises:
        UserError: a gap is above the tolerance; the message shows the first such token.
    """
    policy = check.policy
    check.sampler.update_weights(policy, 0)
    chosen, samples, gap = check.draw()
    gaps = {"sampler and trainer": gap}
    rows = [Row(drawn.tokens, len(drawn.prompt_ids), torch.ones(len(drawn.completion_ids))) for drawn in samples]
    for domain in pool.routes:
        mine = [i for i, example in enumerate(chosen) if domain in (example.domain, REFERENCE)]
        scores = pool.score([rows[i] for i in mine], [domain] * len(mine))
        for position, i in enumerate(mine):
            drawn = samples[i]
            tokens_N = torch.tensor(drawn.completion_ids, device=policy.device)
            scored_N = scores.logprobs([position], tokens_N, config.temperature).cpu()
            who = f"{_names(pool, domain)}, scored as a teacher,"
            if pool.on_servers(domain):
                alone_N = pool.score([rows[i]], [domain]).logprobs([0], tokens_N, config.temperature).cpu()
                name, gap = SERVERS, check.compare(domain, drawn, (who, scored_N), alone_N, ALONE)
            else:
                plain_N = _pooled(pool, domain, drawn, config)
                name, gap = TEACHERS, check.compare(domain, drawn, (who, scored_N), plain_N)
            gaps[name] = max(gaps.get(name, 0.0), gap)
    agreement = ", ".join(f"{who} agree within {gap:.1e}" for who, gap in gaps.items())
    note(f"preflight: {agreement} nats (tolerance {agreement_tolerance(config):g})")


def _pooled(pool: TeacherPool, domain: str, drawn: Sample, config: DistillConfig) -> Tensor:
    """Log-probabilities [N] of a completion under the geometric mean of a domain's teachers."""
    total = sum(routed.weight for routed in pool.routes[domain])
    parts = [routed.weight / total * _taught(pool, routed, drawn, config) for routed in pool.routes[domain]]
    return token_logprobs(torch.stack(parts).sum(0) / config.temperature, _targets(drawn))


def _taught(pool: TeacherPool, routed: Routed, drawn: Sample, config: DistillConfig) -> Tensor:
    with pool.residents.activated(routed.teacher) as model:
        return plain_logits(model, drawn, config.dtype)


def _targets(drawn: Sample) -> Tensor:
    return torch.tensor(drawn.completion_ids)


def _names(pool: TeacherPool, domain: str) -> str:
    return " and ".join(routed.teacher.name for routed in pool.routes[domain])
