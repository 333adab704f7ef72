"""Every objective as the stage uses it: zero at the teacher, the same in chunks, its parts adding up."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from experts.domain import Example
from stages.config.distill import DistillConfig
from stages.config.objective import TopKConfig
from stages.losses.chunked import chunked_token_loss
from stages.losses.divergences import reverse_kl
from stages.losses.log_probabilities import (
    extrapolate,
    importance_weights,
    policy_gradient,
    sampled_advantages,
    token_logprobs,
)
from stages.on_policy.objectives import DIAGNOSE_EVERY, distillation_objective, needs_trainer_logprobs
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import Signals
from stages.sampling.samples import Sample

VOCABULARY, LENGTHS = 11, (3, 1, 4)
CPU = SimpleNamespace(device=torch.device("cpu"))
VARIANTS = {
    "reverse_kl": {},
    "forward_kl": {"type": "forward_kl"},
    "jsd": {"type": "jsd", "beta": 0.3},
    "entropy_aware": {"type": "entropy_aware", "entropy_threshold": 1.5},
    "sampled-drop": {"type": "sampled_reverse_kl"},
    "sampled-truncate": {"type": "sampled_reverse_kl", "importance": "truncate"},
    "sampled-mask": {"type": "sampled_reverse_kl", "importance": "mask"},
    "sampled-sequence": {"type": "sampled_reverse_kl", "importance": "mask", "importance_level": "sequence"},
    "extrapolated": {"extrapolation": 1.5},
    "extrapolated-sampled": {"type": "sampled_reverse_kl", "extrapolation": 1.5},
    "reference": {"reference_kl": 0.1},
    "reference-sampled": {"type": "sampled_reverse_kl", "reference_kl": 0.1},
    **{
        f"top_k-{support}-{remainder}": {"top_k": TopKConfig(k=4, support=support, remainder=remainder)}
        for support, remainder in itertools.product(
            ("student", "teacher", "union", "intersection"), ("renormalise", "correct", "tail")
        )
    },
}


class Logits:
    """A teacher's scores, given as logits of all rows' tokens laid end to end."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV

    exact = True

    def likeliest(self, rows: list[int], k: int) -> None:
        return None

    def per_teacher_logits(self, rows: list[int]) -> dict[str, Callable[[slice], tuple[Tensor, Tensor]]]:
        return {}

    def logits(self, rows: list[int]) -> Callable[[slice], Tensor]:
        assert rows == [0, 1, 2]
        return lambda part: self.logits_NV[part]


def make_rollout(sampler_logits_NV: Tensor, step: int = 2) -> Rollout:
    tokens_N = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    logprobs = token_logprobs(sampler_logits_NV, tokens_N).detach().split(LENGTHS)
    samples = [
        Sample([1], tokens.tolist(), logprobs_N, True)
        for tokens, logprobs_N in zip(tokens_N.split(LENGTHS), logprobs, strict=True)
    ]
    examples = [Example("q", "a", domain, "q") for domain in ("sort", "sort", "reverse")]
    return Rollout(step, examples, samples, ["x"] * 3, [True] * 3, 1)


def random_logits(seed: int) -> Tensor:
    return 2.0 * torch.randn(sum(LENGTHS), VOCABULARY, generator=torch.Generator().manual_seed(seed))


def evaluate(config: DistillConfig, signals: Signals, rollout: Rollout, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [N] and the gradient [N, V] of their sum."""
    logits_NV = logits_NV.detach().requires_grad_()
    losses_N, _ = distillation_objective(config, CPU)(rollout, signals, [0, 1, 2])(logits_NV, slice(None))
    (gradient_NV,) = torch.autograd.grad(losses_N.sum(), logits_NV)
    return losses_N.detach(), gradient_NV


def judged(rollout: Rollout, teacher_NV: Tensor, reference_NV: Tensor, trainer_NV: Tensor, **facts: object) -> Signals:
    tokens_N = rollout.tokens([0, 1, 2], CPU.device)
    trainer = token_logprobs(trainer_NV, tokens_N).split(LENGTHS)
    return Signals(teachers=Logits(teacher_NV), reference=Logits(reference_NV), trainer_logprobs=trainer, **facts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_teacher_equal_to_the_student_leaves_nothing_to_learn(variant):
    config = DistillConfig(objective={"type": "reverse_kl", **VARIANTS[variant]})
    same_NV = random_logits(0)
    rollout = make_rollout(same_NV)
    losses_N, gradient_NV = evaluate(config, judged(rollout, same_NV, same_NV, same_NV), rollout, same_NV)
    assert losses_N.abs().max() < 1e-6
    assert gradient_NV.abs().max() < 1e-6
    # And another teacher does leave something.
    losses_N, gradient_NV = evaluate(config, judged(rollout, random_logits(1), same_NV, same_NV), rollout, same_NV)
    assert gradient_NV.abs().max() > 1e-3


@pytest.mark.parametrize("variant", [name for name, changed in VARIANTS.items() if "extrapolation" not in changed])
def test_every_objective_logs_the_exact_reverse_kl(variant):
    config = DistillConfig(objective={"type": "reverse_kl", **VARIANTS[variant]}, temperature=0.7)
    student_NV, teacher_NV = random_logits(0), random_logits(1)
    # Tokens that nobody's model drew: on them a sampled ratio would mean nothing.
    rollout = make_rollout(random_logits(7))
    objective = distillation_objective(config, CPU)
    signals = judged(rollout, teacher_NV, random_logits(2), student_NV)
    _, metrics = objective(rollout, signals, [0, 1, 2])(student_NV, slice(None))
    exact_N = torch.nn.functional.kl_div(
        (teacher_NV / 0.7).log_softmax(-1), (student_NV / 0.7).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(metrics["reverse_kl"], exact_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_change_no_objective(variant):
    config = DistillConfig(objective={"type": "reverse_kl", **VARIANTS[variant]}, temperature=0.7)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(sum(LENGTHS), 5, generator=generator)
    head_VH = torch.randn(VOCABULARY, 5, generator=generator)
    rollout = make_rollout(random_logits(4))
    # In step 1 the agreement is looked at too, which must not change the loss.
    rollout = Rollout(1, rollout.examples, rollout.samples, rollout.completions, rollout.on_policy, 1)
    signals = judged(rollout, random_logits(1), random_logits(2), random_logits(5), advantages=[1.0, -1.0, 0.5])
    weights_N = torch.rand(sum(LENGTHS), generator=generator)
    found = []
    for chunk_tokens in (100, 3, 1):
        hidden_NH, head_VH = hidden_NH.detach().requires_grad_(), head_VH.detach().requires_grad_()
        objective = distillation_objective(config, CPU)(rollout, signals, [0, 1, 2])
        loss, metrics = chunked_token_loss(hidden_NH, head_VH, weights_N, objective, chunk_tokens)
        found.append([loss, *torch.autograd.grad(loss, (hidden_NH, head_VH))])
        assert all(len(values_N) == sum(LENGTHS) for values_N in metrics.values())
    for other in found[1:]:
        for mine, whole in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


def test_extrapolation_by_one_is_the_teacher_exactly():
    teacher_NV, reference_NV = random_logits(0), random_logits(1)
    teacher_NV[0, 3] = reference_NV[0, 3] = -torch.inf
    assert torch.equal(extrapolate(teacher_NV, reference_NV, 1.0), teacher_NV)
    rollout, student_NV = make_rollout(random_logits(2)), random_logits(3)
    for name in ("reverse_kl", "sampled_reverse_kl"):
        plain, scaled = (
            DistillConfig(objective={"type": name, "extrapolation": factor}) for factor in (1.0, 1.0 + 1e-12)
        )
        signals = judged(rollout, random_logits(0), random_logits(1), student_NV)
        for mine, theirs in zip(
            evaluate(plain, signals, rollout, student_NV),
            evaluate(scaled, signals, rollout, student_NV),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


def test_extrapolation_aims_beyond_the_teacher():
    # One prefix, two tokens: teacher log-odds 1, reference log-odds 0; lambda 2 aims at log-odds 2.
    teacher_V, reference_V = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    target_V = extrapolate(teacher_V, reference_V, 2.0)
    assert float(target_V[0] - target_V[1]) == 2.0
    assert extrapolate(torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), 2.0).item() == -torch.inf


def test_the_parts_of_an_exact_objective_add_up():
    teacher_NV, reference_NV, student_NV = (random_logits(seed) for seed in range(3))
    rollout = make_rollout(random_logits(4))
    signals = judged(rollout, teacher_NV, reference_NV, student_NV, advantages=[1.0, -2.0, 0.5])
    objective = {
        "type": "reverse_kl",
        "reference_kl": 0.3,
        "outcome_weight": 1.0,
        "importance": "truncate",
        "importance_band": (0.5, 3.0),
    }
    losses_N, gradient_NV = evaluate(DistillConfig(objective=objective, group_size=3), signals, rollout, student_NV)
    logits_NV, tokens_N = student_NV.clone().requires_grad_(), rollout.tokens([0, 1, 2], CPU.device)
    logprobs_N = token_logprobs(logits_NV, tokens_N)
    weights_N = (logprobs_N - rollout.logprobs([0, 1, 2], CPU.device)).detach().exp().clamp(max=3.0)
    outcome_N = torch.tensor([1.0] * 3 + [-2.0] + [0.5] * 4)
    oracle_N = (
        reverse_kl(logits_NV, teacher_NV)[0]
        + 0.3 * reverse_kl(logits_NV, reference_NV)[0]
        - weights_N * outcome_N * logprobs_N
    )
    torch.testing.assert_close(losses_N, oracle_N.detach())
    torch.testing.assert_close(gradient_NV, torch.autograd.grad(oracle_N.sum(), logits_NV)[0])


def test_the_sampled_advantage_sums_teacher_outcome_and_reference():
    teacher_NV, reference_NV, student_NV = (random_logits(seed) for seed in range(3))
    rollout = make_rollout(student_NV)
    signals = judged(rollout, teacher_NV, reference_NV, student_NV, advantages=[1.0, -2.0, 0.5])
    objective = {
        "type": "sampled_reverse_kl",
        "extrapolation": 1.25,
        "reference_kl": 0.3,
        "outcome_weight": 1.0,
        "advantage_clip": 2.0,
    }
    losses_N, _ = evaluate(DistillConfig(objective=objective, group_size=3), signals, rollout, student_NV)
    student_N, teacher_N, reference_N = (
        token_logprobs(logits_NV, rollout.tokens([0, 1, 2], CPU.device))
        for logits_NV in (student_NV, teacher_NV, reference_NV)
    )
    # lambda (log T - log R) - (log S - log R), clipped; the importance weight is 1.
    beyond_N = (1.25 * (teacher_N - reference_N) - (student_N - reference_N)).clamp(-2.0, 2.0)
    advantages_N = beyond_N + torch.tensor([1.0] * 3 + [-2.0] + [0.5] * 4) - 0.3 * (student_N - reference_N)
    torch.testing.assert_close(losses_N, -advantages_N * student_N)


def test_sampled_estimator_over_all_sequences_is_the_exact_divergence():
    """Every sequence of two tokens, weighted by its probability: the expectation over samples, prefix by prefix."""
    torch.manual_seed(1)
    vocabulary = 4
    # Row 0 predicts the first token, row 1 + v the second after v.
    logits_PV = torch.randn(1 + vocabulary, vocabulary, dtype=torch.float64, requires_grad=True)
    teacher_PV = torch.randn(1 + vocabulary, vocabulary, dtype=torch.float64)
    policy_PV = logits_PV.detach().log_softmax(-1)
    reach_P = torch.cat([torch.ones(1, dtype=torch.float64), policy_PV[0].exp()])
    exact_P, _ = reverse_kl(logits_PV, teacher_PV)
    (exact_gradient_PV,) = torch.autograd.grad((reach_P * exact_P).sum(), logits_PV)
    value, expectation = 0.0, torch.zeros((), dtype=torch.float64)
    for first, second in itertools.product(range(vocabulary), repeat=2):
        prefixes, tokens_N = [0, 1 + first], torch.tensor([first, second])
        logprobs_N = token_logprobs(logits_PV[prefixes], tokens_N)
        teacher_N = token_logprobs(teacher_PV[prefixes], tokens_N)
        probability = policy_PV[0, first].exp() * policy_PV[1 + first, second].exp()
        advantages_N = sampled_advantages(logprobs_N, teacher_N, clip=100.0)
        expectation = expectation + probability * policy_gradient(logprobs_N, advantages_N, torch.ones(2)).sum()
        value += float((probability * (logprobs_N - teacher_N).sum()).detach())
    assert value == pytest.approx(float((reach_P * exact_P).sum().detach()))
    (sampled_gradient_PV,) = torch.autograd.grad(expectation, logits_PV)
    torch.testing.assert_close(sampled_gradient_PV, exact_gradient_PV)


# Ratios k = trainer / sampler and r = policy / trainer, band [0.5, 2].
CORRECTIONS = {
    # k·r = 1.2, 2.4, 0.3, 0.9
    "drop": [1.2, 0.0, 0.0, 0.9],
    "truncate": [1.2, 2.0, 0.3, 0.9],
    # k = 1, 2.4, 0.6, 3: the second and fourth lie outside.
    "mask": [1.2, 0.0, 0.3, 0.0],
}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_importance_weights_by_hand(correction):
    mismatch_N = torch.tensor([1.0, 2.4, 0.6, 3.0]).log().requires_grad_()
    staleness_N = torch.tensor([1.2, 1.0, 0.5, 0.3]).log().requires_grad_()
    weights_N, metrics = importance_weights(staleness_N, mismatch_N, correction, (0.5, 2.0))
    torch.testing.assert_close(weights_N, torch.tensor(CORRECTIONS[correction]))
    assert not weights_N.requires_grad
    torch.testing.assert_close(metrics["ratio"], torch.tensor([1.2, 2.4, 0.3, 0.9]))


def test_a_sequence_is_kept_or_masked_as_one():
    config = DistillConfig(
        objective={"type": "sampled_reverse_kl", "importance": "mask", "importance_level": "sequence"},
        updates_per_batch=2,
    )
    assert needs_trainer_logprobs(config)
    student_NV, teacher_NV = random_logits(0), random_logits(1)
    rollout = make_rollout(student_NV)
    tokens_N = rollout.tokens([0, 1, 2], CPU.device)
    # log k of the tokens: the first row's mean is log 2.1 (outside), the others' lie inside though one token is not.
    gaps_N = torch.tensor([2.1, 2.1, 2.1, 1.5, 8.0, 0.25, 1.0, 1.0]).log()
    logprobs_N = token_logprobs(student_NV, tokens_N)
    signals = Signals(teachers=Logits(teacher_NV), trainer_logprobs=(logprobs_N + gaps_N).split(LENGTHS))
    losses_N, _ = evaluate(config, signals, rollout, student_NV)
    advantages_N = sampled_advantages(logprobs_N, token_logprobs(teacher_NV, tokens_N), 5.0)
    means_N = torch.tensor([0.0] * 3 + [1.5] + [2.0**0.25] * 4)
    torch.testing.assert_close(losses_N, -means_N * (-gaps_N).exp() * advantages_N * logprobs_N)


def test_a_token_nobody_drew_weighs_one():
    config = DistillConfig(objective={"type": "sampled_reverse_kl"})
    student_NV, teacher_NV = random_logits(0), random_logits(1)
    rollout = make_rollout(torch.full_like(student_NV, torch.nan))
    losses_N, _ = evaluate(config, Signals(teachers=Logits(teacher_NV)), rollout, student_NV)
    logprobs_N, teacher_N = (
        token_logprobs(logits_NV, rollout.tokens([0, 1, 2], CPU.device)) for logits_NV in (student_NV, teacher_NV)
    )
    torch.testing.assert_close(losses_N, -(teacher_N - logprobs_N).clamp(-5, 5) * logprobs_N)


def test_the_advantage_histogram_counts_every_token_once():
    config = DistillConfig()
    student_NV, teacher_NV = random_logits(0), random_logits(1)
    rollout = make_rollout(student_NV, step=1 + DIAGNOSE_EVERY)
    objective = distillation_objective(config, CPU)(rollout, Signals(teachers=Logits(teacher_NV)), [0, 1, 2])
    _, metrics = objective(student_NV, slice(None))
    bins_BN = torch.stack([values_N for name, values_N in metrics.items() if name.startswith("advantage_from")])
    assert bins_BN.sum(0).tolist() == [1.0] * sum(LENGTHS)
    tokens_N = rollout.tokens([0, 1, 2], CPU.device)
    advantages_N = token_logprobs(teacher_NV, tokens_N) - token_logprobs(student_NV, tokens_N)
    assert metrics["advantage_from_1_to_5"].tolist() == ((advantages_N > 1) & (advantages_N <= 5)).float().tolist()
    assert "top_k_overlap" in metrics
    _, quiet = distillation_objective(config, CPU)(
        make_rollout(student_NV, step=2), Signals(teachers=Logits(teacher_NV)), [0, 1, 2]
    )(student_NV, slice(None))
    assert "top_k_overlap" not in quiet


def test_imitation_is_the_cross_entropy_of_what_others_wrote():
    config = DistillConfig(objective="imitation", on_policy_fraction=0.0)
    student_NV, teacher_NV = random_logits(0), random_logits(1)
    rollout = make_rollout(teacher_NV)
    losses_N, gradient_NV = evaluate(config, judged(rollout, teacher_NV, student_NV, student_NV), rollout, student_NV)
    tokens_N = rollout.tokens([0, 1, 2], CPU.device)
    torch.testing.assert_close(losses_N, torch.nn.functional.cross_entropy(student_NV, tokens_N, reduction="none"))
    wanted_NV = student_NV.softmax(-1) - torch.nn.functional.one_hot(tokens_N, VOCABULARY)
    torch.testing.assert_close(gradient_NV, wanted_NV)
    with pytest.raises(ValueError, match="on_policy_fraction of 0"):
        DistillConfig(objective="imitation")
    with pytest.raises(ValueError, match=r"imitation\.extrapolation\s+Extra inputs are not permitted"):
        DistillConfig(objective={"type": "imitation", "extrapolation": 1.5}, on_policy_fraction=0.0)
