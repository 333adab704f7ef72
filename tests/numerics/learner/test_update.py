"""One update: chunked logits, micro-batches and padding change nothing."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stages.config.training import TrainConfig
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.losses.chunked import chunked_token_loss
from stages.rows.packing import micro_batches
from tests.numerics.conftest import tiny_policy


def make_learner(tmp_path: Path, micro_batch_tokens: int = 16384) -> Learner:
    return Learner(tiny_policy(0), TrainConfig(micro_batch_tokens=micro_batch_tokens), 10, tmp_path, 0)


def make_rows(learner: Learner, normalisation: str = "token") -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 3, 12, 7]
    tokens = [torch.randint(5, 100, (length + 4,), generator=generator).tolist() for length in lengths]
    weights = token_weights(lengths, normalisation, learner)
    return [Row(t, 4, w) for t, w in zip(tokens, weights, strict=True)]


def gradients(learner: Learner, rows: Sequence[Row], chunk_tokens: int = 1024) -> dict[str, Tensor]:
    learner.optimizer.zero_grad()
    accumulate(learner, rows, partial(cross_entropy, rows), chunk_tokens)
    return {name: p.grad.clone() for name, p in learner.policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_gradient_equals_plain_cross_entropy(tmp_path, normalisation):
    learner = make_learner(tmp_path)
    rows = make_rows(learner, normalisation)
    ours = gradients(learner, rows)
    learner.optimizer.zero_grad()
    means, sums, count = [], [], 0
    for row in rows:
        logits_TV = learner.policy.model(torch.tensor([row.tokens])).logits[0]
        losses_N = functional.cross_entropy(logits_TV[row.start - 1 : -1], torch.tensor(row.targets), reduction="none")
        means.append(losses_N.mean())
        sums.append(losses_N.sum())
        count += len(losses_N)
    (sum(sums) / count if normalisation == "token" else sum(means) / len(means)).backward()
    for name, parameter in learner.policy.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_accumulated_gradient_equals_the_full_batch(tmp_path):
    whole = make_learner(tmp_path)
    parts = make_learner(tmp_path, micro_batch_tokens=20)
    rows = make_rows(whole)
    assert len(micro_batches([len(row.tokens) for row in rows], 20)) > 2
    full, accumulated = gradients(whole, rows), gradients(parts, rows)
    for name, gradient in full.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing(tmp_path):
    learner = make_learner(tmp_path)
    rows = make_rows(learner)
    whole = gradients(learner, rows)
    for chunk_tokens in (1, 5, 36):
        for name, gradient in gradients(learner, rows, chunk_tokens).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_chunked_loss_equals_cross_entropy_with_gradients():
    torch.manual_seed(0)
    hidden_NH = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    head_VH = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(13, (10,))
    weights_N = torch.rand(10, dtype=torch.float64)

    def token_loss(logits_CV: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        losses_C = functional.cross_entropy(logits_CV, targets_N[part], reduction="none")
        return losses_C, {"loss": losses_C}

    loss, metrics = chunked_token_loss(hidden_NH, head_VH, weights_N, token_loss, 3)
    ours = torch.autograd.grad(2.0 * loss, (hidden_NH, head_VH))
    oracle_N = functional.cross_entropy(hidden_NH @ head_VH.T, targets_N, reduction="none")
    theirs = torch.autograd.grad(2.0 * (oracle_N * weights_N).sum(), (hidden_NH, head_VH))
    # Logits are made in float32.
    torch.testing.assert_close(metrics["loss"].double(), oracle_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(tmp_path):
    learner = make_learner(tmp_path)
    rows = make_rows(learner)
    shortest = min(range(len(rows)), key=lambda i: len(rows[i].tokens))
    together = accumulate(learner, rows, partial(cross_entropy, rows))["loss"][shortest]
    alone = accumulate(learner, rows, partial(cross_entropy, rows), only=[shortest])["loss"][shortest]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_rows_left_out_of_an_update_leave_no_gradient(tmp_path):
    learner = make_learner(tmp_path)
    rows = make_rows(learner)
    silent = [Row(row.tokens, row.start, row.weights_N * (i != 1)) for i, row in enumerate(rows)]
    weightless = gradients(learner, silent)
    learner.optimizer.zero_grad()
    accumulate(learner, rows, partial(cross_entropy, rows), only=[0, 2, 3, 4])
    for name, parameter in learner.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, weightless[name], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_stage(tmp_path):
    learner = make_learner(tmp_path)
    before = [p.detach().clone() for p in learner.policy.model.parameters()]
    rows = [Row(row.tokens, row.start, row.weights_N * float("inf")) for row in make_rows(learner)]
    accumulate(learner, rows, partial(cross_entropy, rows))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        learner.update()
    for parameter, old in zip(learner.policy.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old)


def test_recomputed_activations_give_the_same_gradient_from_less_memory(tmp_path):
    found, kept = [], []
    for recompute in (False, True):
        config = TrainConfig(gradient_checkpointing=recompute)
        learner = Learner(tiny_policy(0), config, 10, tmp_path, 0)
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append(gradients(learner, make_rows(learner)))
        kept.append(sum(saved))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    assert kept[1] < 0.5 * kept[0]
