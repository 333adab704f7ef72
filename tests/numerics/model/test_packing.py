"""Packed rows against the same rows each alone, and how rows are laid into lines and micro-batches."""

import itertools

import pytest
import torch
from torch import Tensor

from stages.model.architecture import Masks
from stages.model.policy import HiddenStates, Policy
from stages.rows.packing import Packed, first_fit, micro_batches, pack
from tests.numerics.conftest import tiny_policy

LENGTHS = (24, 5, 11, 9, 23, 3, 8)
STARTS = (10, 2, 1, 8, 20, 1, 4)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(0)


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 100, (length,), generator=generator).tolist() for length in LENGTHS]


def gradients(policy: Policy, packs: list[Packed], factors: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of all packs and the gradients of their sum, each times its factor."""
    policy.model.zero_grad()
    hidden = [packed.scored(HiddenStates(policy.model)(*packed.inputs)) for packed in packs]
    sum((part_NH * factor_NH).sum() for part_NH, factor_NH in zip(hidden, factors, strict=True)).backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return torch.cat(hidden).detach(), found


def test_packed_equals_each_row_alone(policy, rows):
    together = pack(rows, STARTS, policy.pad_id, policy.device)
    assert together.tokens_BT.shape == (4, 24)
    alone = [pack([row], [start], policy.pad_id, policy.device) for row, start in zip(rows, STARTS, strict=True)]
    counts = [length - start for length, start in zip(LENGTHS, STARTS, strict=True)]
    factors_NH = torch.randn(sum(counts), 32, generator=torch.Generator().manual_seed(1))
    ours_NH, ours = gradients(policy, [together], [factors_NH])
    expected_NH, expected = gradients(policy, alone, list(factors_NH.split(counts)))
    torch.testing.assert_close(ours_NH, expected_NH, rtol=1e-5, atol=1e-5)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_the_filling_and_what_is_not_scored_last_get_exactly_no_gradient(policy, rows):
    packed = pack(rows, STARTS, policy.pad_id, policy.device)
    inputs_BTH = policy.model.get_input_embeddings()(packed.tokens_BT).detach().requires_grad_()
    bias_B1TT, positions_BT = Masks.of(policy.model.config).of_rows(packed.bounds_S, *packed.tokens_BT.shape)
    hidden_BTH = policy.model.get_decoder()(
        inputs_embeds=inputs_BTH, position_ids=positions_BT, attention_mask=bias_B1TT, use_cache=False
    ).last_hidden_state
    packed.scored(hidden_BTH).square().sum().backward()
    filling_BT = packed.tokens_BT == policy.pad_id
    assert int(filling_BT.sum()) == 4 * 24 - sum(LENGTHS)
    assert bool((inputs_BTH.grad[filling_BT] == 0).all())
    # A row's last token predicts nothing scored, and no other row looks at it: of every other token something depends.
    silent = int((inputs_BTH.grad.abs().sum(-1) == 0).sum())
    assert silent == int(filling_BT.sum()) + len(rows)


def test_rows_of_one_length_need_no_mask(policy, rows):
    packed = pack([rows[0], rows[4]], [10, 20], policy.pad_id, policy.device)
    assert packed.bounds_S is None


def test_lines_hold_every_row_once_and_are_few():
    lines = first_fit(LENGTHS, 24)
    assert sorted(itertools.chain(*lines)) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[i] for i in line) <= 24 for line in lines)
    assert len(lines) == 4


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [5, 40, 7, 38, 6, 39, 90, 12]
    batches = micro_batches(lengths, 80, enough_tokens=1)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        width = max(lengths[i] for i in batch)
        assert len(batch) == 1 or width * len(batch) <= 80
        assert all(8 * lengths[i] >= 7 * width for i in batch)
    assert [6] in batches


def test_small_micro_batches_take_rows_of_other_lengths():
    assert micro_batches([16, 4, 15, 1, 8], 100, enough_tokens=100) == [[0, 2, 4, 1], [3]]
    assert micro_batches([16, 4, 15, 2, 8], 100, enough_tokens=32) == [[0, 2], [4, 1, 3]]
