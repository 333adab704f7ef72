"""Demonstrated tokens that conflict with what the model is sure of: left out of the loss, the mean and the gradient."""

from functools import partial

import pytest
import torch
from torch.nn import functional

import stages.sft
from base.store.journal import read
from stages.config.training import ConflictMaskConfig, SFTConfig
from stages.learner.supervised import _update_on_kept, cross_entropy
from stages.learner.update import Row, accumulate
from tests.numerics.learner.test_update import make_learner, make_rows

# Sure of token 0; sure between 0 and 1; unsure.
LOGITS_CV = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
TARGETS = [0, 2, 2]


def test_only_the_improbable_where_the_model_is_sure_is_masked():
    row = Row([5, *TARGETS], 1, torch.full((3,), 1 / 3))
    logits_CV = LOGITS_CV.clone().requires_grad_()
    conflicts = ConflictMaskConfig(probability=0.2, entropy=0.5)
    losses_C, metrics = cross_entropy([row], [0], conflicts)(logits_CV, slice(0, 3))
    plain_C = functional.cross_entropy(LOGITS_CV, torch.tensor(TARGETS), reduction="none")
    # The last is improbable too (0.155), but the model is unsure there (1.01 nats).
    assert metrics["masked"].tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(losses_C, plain_C * torch.tensor([1.0, 0.0, 1.0]))
    (gradient_CV,) = torch.autograd.grad(losses_C.sum(), logits_CV)
    assert gradient_CV[1].abs().max() == 0.0
    assert gradient_CV[2].abs().max() > 0.1


@pytest.mark.parametrize("micro_batch_tokens", [16384, 20])
def test_the_gradient_is_that_of_the_mean_over_what_is_left(tmp_path, monkeypatch, micro_batch_tokens):
    learner = make_learner(tmp_path, micro_batch_tokens)
    rows = make_rows(learner)
    # Thresholds at which some tokens of a random model go and others stay.
    conflicts = ConflictMaskConfig(probability=0.005, entropy=5.0)
    model = learner.policy.model
    total, count, scored = torch.zeros(()), 0, 0
    for row in rows:
        logits_NV = model(torch.tensor([row.tokens])).logits[0, row.start - 1 : -1]
        losses_N = functional.cross_entropy(logits_NV, torch.tensor(row.targets), reduction="none")
        entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
        kept_N = (losses_N.neg().exp() >= 0.005) | (entropy_N >= 5.0)
        total, count, scored = total + losses_N[kept_N].sum(), count + int(kept_N.sum()), scored + len(kept_N)
    assert 0 < count < scored
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    learner.optimizer.zero_grad()
    values = accumulate(learner, rows, partial(cross_entropy, rows, conflicts=conflicts), 7)
    loss = sum(float((rows[i].weights_N * loss_N).sum()) for i, loss_N in values["loss"].items())
    monkeypatch.setattr(learner, "update", dict)
    found = _update_on_kept(learner, rows, values["masked"], loss)
    assert found == pytest.approx({"loss": (total / count).item(), "masked_share": 1 - count / scored}, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def journal_of(place):
    return [record["values"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "metrics"]


def test_a_stage_with_nothing_left_learns_nothing(checkpoint, domains, workspace):
    everything = ConflictMaskConfig(probability=1.0, entropy=100.0)
    place = workspace("expert", {"start": checkpoint("start", 0)}, {"sort": domains["sort"]})
    expert = stages.sft.train(SFTConfig(max_steps=2, examples=16, batch_size=8, mask_conflicts=everything), place)
    assert [(step["sft/loss"], step["sft/masked_share"]) for step in journal_of(place)] == [(0.0, 1.0)] * 2
    assert (
        expert.manifest["files"]["model.safetensors"] == place.parents["start"].manifest["files"]["model.safetensors"]
    )


def test_masking_nothing_is_plain_sft(checkpoint, domains, workspace):
    parents = {"start": checkpoint("start", 0)}
    nothing = ConflictMaskConfig(probability=0.0)
    journals = []
    for key, mask in (("plain", None), ("masked", nothing)):
        place = workspace(key, parents, {"sort": domains["sort"]})
        stages.sft.train(SFTConfig(max_steps=3, examples=16, batch_size=8, mask_conflicts=mask), place)
        journals.append(journal_of(place))
    plain, masked = journals
    assert [step["sft/masked_share"] for step in masked] == [0.0] * 3
    assert [step["sft/loss"] for step in masked] == pytest.approx([step["sft/loss"] for step in plain], rel=1e-4)
    assert SFTConfig().key_fields().keys() == SFTConfig(mask_conflicts=nothing).key_fields().keys() - {"mask_conflicts"}
