"""What little a server tells of a teacher is all that the sampled and top-k objectives need."""

import itertools

import pytest
import torch
from torch import Tensor

from stages.config.distill import DistillConfig
from stages.config.objective import TopKConfig
from stages.losses.log_probabilities import token_logprobs
from stages.on_policy.objectives import distillation_objective
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import Signals
from stages.teachers.remote_teachers import RemoteScores, TopLogprobs
from tests.numerics.on_policy.test_objectives import (
    CPU,
    LENGTHS,
    VOCABULARY,
    Logits,
    evaluate,
    make_rollout,
    random_logits,
)

TOP_K = [
    {"type": name, "top_k": TopKConfig(k=4, support="teacher", remainder=remainder)}
    for name, remainder in itertools.product(("reverse_kl", "forward_kl", "jsd"), ("renormalise", "correct", "tail"))
]


def told(logits_NV: Tensor, rollout: Rollout, top: int) -> RemoteScores:
    """What a server would tell of a teacher with these logits."""
    logprobs, known = logits_NV.log_softmax(-1).split(LENGTHS), []
    for row, logprobs_NV in enumerate(logprobs):
        tokens = rollout.samples[row].completion_ids
        ids = logprobs_NV.topk(top).indices.tolist() if top else [[] for _ in tokens]
        entries = [
            {index: float(logprobs_NV[i, index]) for index in [token, *ids[i]]} for i, token in enumerate(tokens)
        ]
        known.append(TopLogprobs.of(entries, tokens, top + 1, VOCABULARY))
    return RemoteScores(known, VOCABULARY, {}, CPU.device)


@pytest.mark.parametrize("variant", [{"type": "sampled_reverse_kl"}, *TOP_K], ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_an_objective_is_the_same_whoever_scores(variant, step):
    config = DistillConfig(objective=variant, teacher_backend="vllm_server")
    teacher_NV, student_NV = random_logits(1), random_logits(0)
    rollout = make_rollout(random_logits(2), step)
    top = 4 if "top_k" in variant else 0
    here = evaluate(config, Signals(teachers=Logits(teacher_NV)), rollout, student_NV)
    there = evaluate(config, Signals(teachers=told(teacher_NV, rollout, top)), rollout, student_NV)
    for mine, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert here[1].abs().max() > 1e-3


def test_a_top_k_objective_makes_no_distribution_of_what_was_told(monkeypatch):
    config = DistillConfig(objective=TOP_K[0], teacher_backend="vllm_server")
    rollout = make_rollout(random_logits(2), 1)
    scores = told(random_logits(1), rollout, 4)
    monkeypatch.setattr(
        RemoteScores, "logits", lambda self, rows: lambda part: pytest.fail("[C, V] was made of the teacher")
    )
    _, gradient, *_ = evaluate(config, Signals(teachers=scores), rollout, random_logits(0))
    assert gradient.abs().max() > 1e-3


def test_the_likeliest_tokens_are_distinct_where_the_sampled_one_is_among_them():
    teacher_NV = random_logits(1)
    rollout = make_rollout(random_logits(2))
    likeliest = int(teacher_NV[0].argmax())
    rollout.samples[0].completion_ids[0] = likeliest
    ids_NK, logprobs_NK, valid_NK = told(teacher_NV, rollout, 3).likeliest([0, 1, 2], 3)(slice(None))
    expected_NK = teacher_NV.log_softmax(-1).topk(3)
    assert torch.equal(ids_NK, expected_NK.indices)
    assert valid_NK.all()
    torch.testing.assert_close(logprobs_NK, expected_NK.values)
    # All that a server of one token has told: the second place is empty.
    ids_NK, _, valid_NK = told(teacher_NV, rollout, 1).likeliest([0, 1, 2], 2)(slice(None))
    assert ids_NK[0, 0] == likeliest
    assert valid_NK[0].tolist() == [True, False]


def test_the_whole_vocabulary_told_is_the_whole_distribution():
    teacher_NV = random_logits(1)
    rollout = make_rollout(random_logits(2))
    scores = told(teacher_NV, rollout, VOCABULARY)
    torch.testing.assert_close(scores.logits([0, 1, 2])(slice(None)), teacher_NV.log_softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        scores.logits([2, 0])(slice(1, 6)), teacher_NV.log_softmax(-1)[[5, 6, 7, 0, 1]], rtol=1e-5, atol=1e-5
    )


def test_what_is_not_told_shares_what_is_left():
    teacher_NV = random_logits(1)
    rollout = make_rollout(random_logits(2))
    probs_NV = told(teacher_NV, rollout, 3).logits([0, 1, 2])(slice(None)).exp()
    torch.testing.assert_close(probs_NV.sum(1), torch.ones(sum(LENGTHS)))
    likeliest_NK = teacher_NV.topk(3).indices
    assert torch.equal(probs_NV.topk(3).indices, likeliest_NK)
    assert (probs_NV > 0).all()


def test_rounding_lifts_nothing_above_what_was_told():
    teacher_NV = 20.0 * random_logits(1)
    rollout = make_rollout(random_logits(2))
    scores = told(teacher_NV, rollout, 3).logits([0, 1, 2])(slice(None))
    values_NK, likeliest_NK = teacher_NV.log_softmax(-1).topk(3)
    assert (values_NK[:, -1] < -20).any()
    others_NV = scores.scatter(1, likeliest_NK, -torch.inf)
    others_NV.scatter_(1, rollout.tokens([0, 1, 2], CPU.device)[:, None], -torch.inf)
    assert (others_NV.amax(1) <= scores.gather(1, likeliest_NK).amin(1)).all()


def test_the_log_tells_the_estimate_on_the_students_own_tokens_only():
    config = DistillConfig(objective={"type": "sampled_reverse_kl"}, teacher_backend="vllm_server")
    teacher_NV, student_NV = random_logits(1), random_logits(0)
    rollout = make_rollout(student_NV)
    rollout.samples[1].logprobs_N.fill_(torch.nan)
    signals = Signals(teachers=told(teacher_NV, rollout, 0))
    _, metrics = distillation_objective(config, CPU)(rollout, signals, [0, 1, 2])(student_NV, slice(None))
    tokens_N = rollout.tokens([0, 1, 2], CPU.device)
    expected_N = token_logprobs(student_NV, tokens_N) - token_logprobs(teacher_NV, tokens_N)
    assert metrics["reverse_kl"][3].isnan()
    own = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(metrics["reverse_kl"][own], expected_N[own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, "objective reverse_kl needs more of the teacher"),
        ({"objective": {"type": "reverse_kl", "top_k": {"support": "student"}}}, "support: teacher"),
        ({"objective": "jsd"}, "objective jsd needs more"),
        ({"objective": "sampled_reverse_kl", "temperature": 0.7}, "temperature 1 only"),
        (
            {"objective": {"type": "reverse_kl", "top_k": {}, "extrapolation": 1.5}},
            "extrapolates with sampled_reverse_kl only",
        ),
        ({"objective": "sampled_reverse_kl", "teacher_weights": {"a": {"b": 1.0, "c": 1.0}}}, "one teacher per domain"),
        ({"objective": "sampled_reverse_kl", "on_policy_fraction": 0.5}, "needs local teachers"),
    ],
)
def test_what_servers_cannot_tell_is_refused(changed, problem):
    with pytest.raises(ValueError, match=problem):
        DistillConfig(teacher_backend="vllm_server", **changed)
