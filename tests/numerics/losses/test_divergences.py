"""Divergences against a table worked by hand and a float64 oracle differentiated by autograd."""

import itertools
from collections.abc import Callable
from functools import partial
from math import log

import pytest
import torch
from torch import Tensor

from stages.losses.chunked import chunked_token_loss
from stages.losses.divergences import diagnose, entropy_aware, forward_kl, jsd, reverse_kl, support, top_k_divergence
from stages.losses.log_probabilities import Losses

BETA, THRESHOLD = 1 / 3, 1.2
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
SUPPORTS = ("student", "teacher", "union", "intersection")
REMAINDERS = ("renormalise", "correct", "tail")
Divergence = Callable[[Tensor, Tensor], Losses]
EXACT: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": partial(jsd, beta=BETA),
    "entropy_aware": partial(entropy_aware, threshold=THRESHOLD),
}
L = log(2)
S_V, T_V = (1 / 2, 1 / 4, 1 / 8, 1 / 8), (1 / 8, 1 / 2, 1 / 4, 1 / 8)


def random_pair(seed: int, tokens: int = 6, vocabulary: int = 9, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2.0 * torch.randn(tokens, vocabulary, generator=generator, dtype=dtype) for _ in range(2)]


def local(divergence: str, source: str, remainder: str, k: int) -> Divergence:
    """The top-k form where the teacher's logits are at hand."""

    def run(logits_NV: Tensor, teacher_logits_NV: Tensor) -> Losses:
        indices_NK, valid_NK = support(logits_NV, teacher_logits_NV, k, source)
        wide = torch.promote_types(teacher_logits_NV.dtype, torch.float32)
        teacher_NK = teacher_logits_NV.log_softmax(-1, dtype=wide).gather(1, indices_NK)
        return top_k_divergence(logits_NV, teacher_NK, indices_NK, valid_NK, divergence, remainder, BETA)

    return run


def differentiated(run: Divergence, logits_NV: Tensor, teacher_NV: Tensor) -> list[Tensor]:
    """Losses [N], and the gradient [N, V] of their weighted sum."""
    logits_NV = logits_NV.detach().requires_grad_()
    losses_N, _ = run(logits_NV, teacher_NV)
    weights_N = torch.arange(1, len(losses_N) + 1, dtype=losses_N.dtype)
    return [losses_N.detach(), torch.autograd.grad((weights_N * losses_N).sum(), logits_NV)[0]]


def oracle_terms(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Each token's term of the corrected form, from probabilities."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return p * (p / q).log() - p + q

    mixture = BETA * teacher + (1 - BETA) * student
    return {
        "reverse_kl": lambda: kl(student, teacher),
        "forward_kl": lambda: kl(teacher, student),
        "jsd": lambda: BETA * kl(teacher, mixture) + (1 - BETA) * kl(student, mixture),
    }[divergence]()


def exact_oracle(name: str, logits_NV: Tensor, teacher_NV: Tensor) -> Losses:
    student_NV, teacher_NV = logits_NV.softmax(-1), teacher_NV.softmax(-1)
    if name == "entropy_aware":
        unsure_N = torch.distributions.Categorical(probs=teacher_NV).entropy() > THRESHOLD
        assert 0 < unsure_N.sum() < len(unsure_N)
        reverse_N, forward_N = (oracle_terms(d, student_NV, teacher_NV).sum(-1) for d in ("reverse_kl", "forward_kl"))
        return reverse_N + unsure_N * forward_N, {}
    return oracle_terms(name, student_NV, teacher_NV).sum(-1), {}


def top_k_oracle(divergence: str, source: str, remainder: str, k: int, logits_NV: Tensor, teacher_NV: Tensor) -> Losses:
    """The definition, one token of the text after another, the support a set."""
    losses = []
    for logits_V, teacher_V in zip(logits_NV, teacher_NV, strict=True):
        students, teachers = (set(x_V.argsort(descending=True)[:k].tolist()) for x_V in (logits_V, teacher_V))
        among = {
            "student": students,
            "teacher": teachers,
            "union": students | teachers,
            "intersection": students & teachers,
        }
        chosen = sorted(among[source])
        s_V, t_V = logits_V.softmax(-1), teacher_V.softmax(-1)
        s, t = s_V[chosen], t_V[chosen]
        others = [v for v in range(len(s_V)) if v not in chosen]
        if remainder == "renormalise":
            s, t = s / s.sum(), t / t.sum()
        elif remainder == "tail" and others:
            s, t = (torch.cat([p, p_V[others].sum()[None]]) for p, p_V in ((s, s_V), (t, t_V)))
        losses.append(oracle_terms(divergence, s, t).sum())
    return torch.stack(losses), {}


REVERSE, FORWARD = 0.625 * L, 0.5 * L
# m = (3/8, 1/3, 1/6, 1/8).
JSD = (log(1 / 3) / 8 + 0.75 * log(3 / 2)) / 3 + 2 / 3 * (log(4 / 3) / 2 + 3 / 8 * log(3 / 4))
BY_HAND = {"reverse_kl": REVERSE, "forward_kl": FORWARD, "jsd": JSD, "entropy_aware": REVERSE + FORWARD}


@pytest.mark.parametrize("name", EXACT)
def test_exact_by_hand(name):
    losses_N, metrics = EXACT[name](torch.tensor([S_V]).log() + 3.0, torch.tensor([T_V]).log() - 1.0)
    assert losses_N.item() == pytest.approx(BY_HAND[name], rel=1e-6)
    assert metrics["reverse_kl"].item() == pytest.approx(REVERSE, rel=1e-6)
    # log 2 of 1, 2, 3 and 3 bits.
    assert metrics["entropy"].item() == pytest.approx(1.75 * L, rel=1e-6)


def test_reverse_kl_gradient_by_hand():
    logits_NV = torch.tensor([S_V]).log().requires_grad_()
    (gradient_NV,) = torch.autograd.grad(reverse_kl(logits_NV, torch.tensor([T_V]).log())[0].sum(), logits_NV)
    # S·(log2(S/T) − 0.625)·log 2, the log-ratios 2, −1, −1 and 0 bits.
    by_hand = [1 / 2 * 1.375 * L, -1 / 4 * 1.625 * L, -1 / 8 * 1.625 * L, -1 / 8 * 0.625 * L]
    assert gradient_NV[0].tolist() == pytest.approx(by_hand, rel=1e-5)


def test_entropy_aware_leaves_a_sure_teacher_to_the_reverse_kl():
    # The teacher's entropy is 1.75·log 2 = 1.213.
    student_NV, teacher_NV = torch.tensor([S_V]).log(), torch.tensor([T_V]).log()
    for threshold, loss, unsure in ((1.21, REVERSE + FORWARD, 1.0), (1.22, REVERSE, 0.0)):
        losses_N, metrics = entropy_aware(student_NV, teacher_NV, threshold)
        assert losses_N.item() == pytest.approx(loss, rel=1e-6)
        assert metrics["unsure"].item() == unsure


# Tokens 0 and 1: S = 1/2, 1/4 and 1/4 is left; T = 1/8, 1/2 and 3/8 is left. Renormalised 2/3, 1/3 and 1/5, 4/5.
TOP_2 = {
    ("reverse_kl", "correct"): 0.75 * L - 1 / 8,
    ("reverse_kl", "tail"): 0.75 * L + log(2 / 3) / 4,
    ("reverse_kl", "renormalise"): 2 / 3 * log(10 / 3) + 1 / 3 * log(5 / 12),
    ("forward_kl", "correct"): 0.25 * L + 1 / 8,
    ("forward_kl", "tail"): 0.25 * L + 3 / 8 * log(3 / 2),
    ("forward_kl", "renormalise"): log(3 / 10) / 5 + 4 / 5 * log(12 / 5),
    # m = 3/8, 1/3; the rest 7/24; renormalised 23/45, 22/45.
    ("jsd", "correct"): (log(1 / 3) / 8 + log(3 / 2) / 2) / 3 + 2 / 3 * (log(4 / 3) / 2 + log(3 / 4) / 4),
    ("jsd", "tail"): (log(1 / 3) / 8 + log(3 / 2) / 2 + 3 / 8 * log(9 / 7)) / 3
    + 2 / 3 * (log(4 / 3) / 2 + log(3 / 4) / 4 + log(6 / 7) / 4),
    ("jsd", "renormalise"): (log(9 / 23) / 5 + 4 / 5 * log(18 / 11)) / 3
    + 2 / 3 * (2 / 3 * log(30 / 23) + log(15 / 22) / 3),
}


@pytest.mark.parametrize(("divergence", "remainder"), TOP_2)
def test_top_k_by_hand(divergence, remainder):
    logits_NV, teacher_NK = torch.tensor([S_V]).log() + 2.0, torch.tensor([T_V[1::-1]]).log()
    indices_NK = torch.tensor([[1, 0]])
    arguments = (teacher_NK, indices_NK, torch.ones_like(indices_NK, dtype=torch.bool), divergence, remainder, BETA)
    losses_N, metrics = top_k_divergence(logits_NV, *arguments)
    assert losses_N.item() == pytest.approx(TOP_2[divergence, remainder], rel=1e-5)
    # No divergence of other objectives' kind is known of a support alone.
    assert "reverse_kl" not in metrics
    assert metrics["entropy"].item() == pytest.approx(1.75 * L, rel=1e-5)
    assert metrics["teacher_mass"].item() == pytest.approx(5 / 8, rel=1e-5)


def test_support_by_hand():
    student_NV = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    teacher_NV = torch.tensor([[3.0, 1.0, 4.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    chosen = {}
    for source in SUPPORTS:
        indices_NK, valid_NK = support(student_NV, teacher_NV, 2, source)
        chosen[source] = [ids[counts].tolist() for ids, counts in zip(indices_NK, valid_NK, strict=True)]
    assert chosen == {
        "student": [[0, 1], [0, 1]],
        "teacher": [[2, 0], [3, 2]],
        "union": [[0, 1, 2], [0, 1, 3, 2]],
        "intersection": [[0], []],
    }
    assert support(student_NV, teacher_NV, 99, "teacher")[0].shape == (2, 4)


@pytest.mark.parametrize("name", EXACT)
def test_exact_against_the_oracle(name):
    pair = random_pair(0)
    ours = differentiated(EXACT[name], *pair)
    torch.testing.assert_close(ours, differentiated(partial(exact_oracle, name), *pair))
    _, metrics = EXACT[name](*pair)
    torch.testing.assert_close(metrics["reverse_kl"], exact_oracle("reverse_kl", *pair)[0])
    torch.testing.assert_close(metrics["entropy"], torch.distributions.Categorical(logits=pair[0]).entropy())


@pytest.mark.parametrize(
    ("divergence", "source", "remainder"), list(itertools.product(DIVERGENCES, SUPPORTS, REMAINDERS))
)
def test_top_k_against_the_oracle(divergence, source, remainder):
    pair = random_pair(1)
    for k in (1, 3, 5):
        ours = differentiated(local(divergence, source, remainder, k), *pair)
        oracle = partial(top_k_oracle, divergence, source, remainder, k)
        torch.testing.assert_close(ours, differentiated(oracle, *pair))
    # As many tokens as there are is the exact form; a large vocabulary in float32 shows the rounding.
    large = random_pair(2, 4, 1000, torch.float32)
    for (exact, top), tolerance in zip(
        ((random_pair(1), 9), (large, 1000)), ({}, {"rtol": 1e-5, "atol": 2e-6}), strict=True
    ):
        whole = differentiated(local(divergence, source, remainder, top), *exact)
        ideal = differentiated(EXACT[divergence], *exact)
        torch.testing.assert_close(whole, ideal, **tolerance)


def test_an_equal_teacher_leaves_exactly_nothing():
    logits_NV, _ = random_pair(3, 5, 400, torch.float32)
    logits_NV[0, 7] = -torch.inf
    for name, run in EXACT.items():
        losses_N, gradient_NV = differentiated(run, logits_NV, logits_NV)
        assert not losses_N.any(), name
        assert not gradient_NV.any(), name
    for form in itertools.product(DIVERGENCES, SUPPORTS, REMAINDERS):
        for k in (1, 16, 400):
            run = local(*form, k)
            losses_N, gradient_NV = differentiated(run, logits_NV, logits_NV)
            assert losses_N.abs().max() < 1e-7, form
            assert gradient_NV.abs().max() < 1e-7, form


def test_jsd_tends_to_the_two_kls():
    pair = random_pair(4)
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        limit = [found / min(beta, 1 - beta) for found in differentiated(partial(jsd, beta=beta), *pair)]
        ideal = differentiated(EXACT[name], *pair)
        torch.testing.assert_close(limit, ideal, rtol=1e-3, atol=1e-3)


def test_a_tail_bucket_hides_divergence_and_more_tokens_uncover_it():
    pair = random_pair(5)
    for divergence in DIVERGENCES:
        # The teacher's top k grow by one token at a time, so each partition refines the last.
        losses_KN = torch.stack([local(divergence, "teacher", "tail", k)(*pair)[0] for k in range(1, 10)])
        assert (losses_KN.diff(dim=0) > -1e-12).all()
        assert (losses_KN >= 0).all()
        # Each corrected term is at least 0, so that more of them add up to more.
        corrected_KN = torch.stack([local(divergence, "teacher", "correct", k)(*pair)[0] for k in range(1, 10)])
        assert (corrected_KN.diff(dim=0) > -1e-12).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_leaves_the_bucket_nothing_keeps_a_precise_gradient(divergence):
    # All but 1e-6 of the student's mass is on two tokens, where the teacher has 0.8.
    probs = [[0.6, 0.4 - 1e-6, 5e-7, 5e-7], [0.3, 0.5, 0.1, 0.1]]
    student_NV, teacher_NV = (torch.tensor([p], dtype=torch.float64).log() for p in probs)
    run = local(divergence, "teacher", "tail", 2)
    low = differentiated(run, student_NV.float(), teacher_NV.float())
    high = differentiated(run, student_NV, teacher_NV)
    torch.testing.assert_close(low[1].double(), high[1], rtol=1e-3, atol=2e-6)


def test_an_empty_intersection_teaches_nothing_when_renormalised():
    student_NV = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    run = local("reverse_kl", "intersection", "renormalise", 2)
    losses_N, gradient_NV = differentiated(run, student_NV, student_NV.flip(1))
    assert losses_N.tolist() == [0.0]
    assert not gradient_NV.any()


def test_ruled_out_tokens_give_no_nan():
    student_NV, teacher_NV = random_pair(6, 4, 8, torch.float32)
    student_NV[0, 6:] = teacher_NV[0, 6:] = -torch.inf  # a padded vocabulary
    student_NV[1, 6:] = -torch.inf
    teacher_NV[2, 6:] = -torch.inf
    forms = list(itertools.product(DIVERGENCES, SUPPORTS, REMAINDERS))
    runs = [*EXACT.values(), *(local(*form, k) for form in forms for k in (2, 7, 8))]
    for run in runs:
        losses_N, metrics = run(student_NV, teacher_NV)
        assert losses_N.isfinite().all()
        assert all(values_N.isfinite().all() for values_N in metrics.values())
        _, gradient_NV = differentiated(run, student_NV, teacher_NV)
        assert gradient_NV.isfinite().all()
    for run in EXACT.values():
        padded = differentiated(run, student_NV[:1], teacher_NV[:1])
        cut = differentiated(run, student_NV[:1, :6], teacher_NV[:1, :6])
        torch.testing.assert_close(padded[0], cut[0])
        torch.testing.assert_close(padded[1][:, :6], cut[1])
        assert not padded[1][:, 6:].any()
    assert all(values_N.isfinite().all() for values_N in diagnose(student_NV, teacher_NV, 3).values())


@pytest.mark.parametrize(("divergence", "remainder"), TOP_2)
def test_a_teacher_that_sends_its_top_k_is_as_good_as_its_logits(divergence, remainder):
    logits_NV, teacher_NV = random_pair(7)
    sent = teacher_NV.log_softmax(-1).topk(3)

    def remote(logits_NV: Tensor, _: Tensor) -> Losses:
        every_NK = torch.ones_like(sent.indices, dtype=torch.bool)
        return top_k_divergence(logits_NV, sent.values, sent.indices, every_NK, divergence, remainder, BETA)

    ours = differentiated(local(divergence, "teacher", remainder, 3), logits_NV, teacher_NV)
    torch.testing.assert_close(differentiated(remote, logits_NV, teacher_NV), ours)


def test_low_precision_logits_are_worked_on_in_float32():
    low = [logits.to(torch.bfloat16) for logits in random_pair(8)]
    for run in (*EXACT.values(), local("jsd", "union", "tail", 3)):
        ours = differentiated(run, *low)
        high = differentiated(run, *(logits.float() for logits in low))
        assert ours[0].dtype == torch.float32
        assert torch.equal(ours[0], high[0])
        assert torch.equal(ours[1], high[1].to(torch.bfloat16))


def test_diagnosis_by_hand():
    student_NV, teacher_NV = torch.tensor([S_V, S_V]).log(), torch.tensor([T_V, (0.25,) * 4]).log()
    teacher_NV[1] += torch.tensor([0.0, 0.0, 1e-6, 1e-6])
    found = diagnose(student_NV, teacher_NV, 2)
    # The student's top two are 0 and 1; the teachers' 1 and 2, and 2 and 3.
    assert found["top_k_overlap"].tolist() == [0.5, 0.0]
    torch.testing.assert_close(found["teacher_entropy"], torch.tensor([1.75 * L, 2 * L]))
    torch.testing.assert_close(found["entropy_gap"], torch.tensor([0.0, -0.25 * L]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_chunks_from_hidden_states_as_from_all_logits(dtype):
    generator = torch.Generator().manual_seed(9)
    hidden_NH, head_VH = (torch.randn(n, 5, generator=generator).to(dtype).requires_grad_() for n in (10, 13))
    teacher_NV = torch.randn(10, 13, generator=generator, dtype=torch.float64)
    weights_N = torch.rand(10, generator=generator)
    loss, metrics = chunked_token_loss(
        hidden_NH, head_VH, weights_N, lambda logits_CV, part: reverse_kl(logits_CV, teacher_NV[part]), 3
    )
    ours = torch.autograd.grad(2 * loss, (hidden_NH, head_VH), retain_graph=True)
    wide = torch.promote_types(dtype, torch.float32)
    losses_N, whole = reverse_kl(hidden_NH.to(wide) @ head_VH.to(wide).T, teacher_NV)
    theirs = torch.autograd.grad(2 * (losses_N * weights_N).sum(), (hidden_NH, head_VH))
    assert loss.dtype == wide
    assert [gradient.dtype for gradient in ours] == [dtype, dtype]
    torch.testing.assert_close(ours, theirs, **({"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))
    torch.testing.assert_close(metrics, whole)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(loss, hidden_NH)
