"""Products that may go to oneDNN: the same values and gradients as torch's own, whatever takes them."""

import pytest
import torch
from torch import nn

import stages.model.linear
from stages.model.linear import WORTHWHILE, matmul_t, use_onednn
from tests.numerics.conftest import tiny_policy

SHAPE = (3, 96, 128, 256)


@pytest.fixture(autouse=True)
def _slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose wide units MKL leaves unused."""
    monkeypatch.setattr(stages.model.linear, "_mkl_is_slow", lambda: True)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the left factors that went to oneDNN."""
    seen: list[torch.Size] = []
    run = stages.model.linear._run

    def noted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(left.shape)
        return run(left, right)

    monkeypatch.setattr(stages.model.linear, "_run", noted)
    return seen


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    batch, rows, inputs, outputs = SHAPE
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, rows, inputs, generator=generator)
    assert left.numel() * outputs >= WORTHWHILE
    return left, torch.randn(outputs, inputs, generator=generator)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_products_and_their_gradients_are_those_of_float64(runs, needs, contiguous):
    left, right = factors()
    if not contiguous:
        right = right.T.contiguous().T
    upstream = torch.randn(*left.shape[:-1], right.shape[0], generator=torch.Generator().manual_seed(1))
    sides = []
    for dtype in (torch.float32, torch.float64):
        a, b = (x.detach().to(dtype).requires_grad_(need) for x, need in zip((left, right), needs, strict=True))
        found = matmul_t(a, b)
        if any(needs):
            found.backward(upstream.to(dtype))
        sides.append([found.detach(), a.grad, b.grad])
    assert len(runs) == 1 + sum(needs)
    for ours, exact in zip(*sides, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def test_what_is_left_to_torch(runs):
    left, right = factors()
    small = left[0, :4]
    assert torch.equal(matmul_t(small, right), small @ right.T)
    assert torch.equal(matmul_t(left.bfloat16(), right.bfloat16()), left.bfloat16() @ right.bfloat16().T)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(matmul_t(left, right), left @ right.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul_t(left, right).dtype == torch.bfloat16
    assert not runs


def test_layers_keep_their_names_their_bias_and_their_output(runs):
    layer = nn.Linear(128, 256)
    plain_state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    left = factors()[0].requires_grad_()
    expected = layer(left)
    gradients = torch.autograd.grad(expected.square().sum(), [left, layer.weight, layer.bias])
    model = nn.Sequential(layer)
    use_onednn(model)
    found = model(left)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(found.square().sum(), [left, layer.weight, layer.bias])
    for ours_part, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(ours_part, theirs, rtol=1e-4, atol=1e-3)
    assert runs
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == plain_state.keys()


def test_a_model_gives_the_same_logits_and_gradients(runs):
    policy = tiny_policy(3)
    tokens = torch.randint(5, 100, (16, 60), generator=torch.Generator().manual_seed(0))
    sides = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            logits = policy.model(tokens).logits
            loss = logits.log_softmax(-1)[..., 7].mean()
            sides.append([logits.detach(), *torch.autograd.grad(loss, list(policy.model.parameters()))])
        if enabled:
            assert runs
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
