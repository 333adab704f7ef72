"""AdamW with moments in 8 bits against AdamW in float32, and what is loaded of it."""

from functools import partial
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from base import extras
from base.errors import UserError
from flows.engines import memory_terms as terms
from flows.engines.memory_terms import Trained
from flows.engines.shapes import shape_of_config
from stages.config.training import OptimizerConfig, TinyModelConfig, TrainConfig
from stages.learner import device
from stages.learner.optimizer import adamw, load_state
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.model.policy import Policy
from stages.model.tiny import character_tokenizer, tiny_model

# Wide enough that every matrix has the 4096 values from which moments have 8 bits.
WIDE = TinyModelConfig(hidden_size=128, layers=2, heads=2, intermediate_size=256, max_length=64)
STEPS, ROWS, LENGTH = 40, 16, 20
NARROW = {"learning_rate": 1e-3, "states": "8bit"}


def learner_of(folder: Path, **optimizer: object) -> Learner:
    AcceleratorState._reset_state(reset_partial_state=True)
    tokenizer = character_tokenizer()
    policy = Policy(tiny_model(WIDE, tokenizer, 0).eval(), tokenizer)
    return Learner(policy, TrainConfig(optimizer=OptimizerConfig(**optimizer)), STEPS, folder, 0)


def train(learner: Learner) -> list[float]:
    """The mean loss before each step, on rows whose next token is a function of the last one."""
    starts = torch.randint(90, (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = [[5 + (start + 7 * place) % 90 for place in range(LENGTH)] for start in starts]
    weights = token_weights([LENGTH - 1] * ROWS, "token", learner)
    rows, found = [Row(row, 1, weight) for row, weight in zip(tokens, weights, strict=True)], []
    for _ in range(STEPS):
        losses = accumulate(learner, rows, partial(cross_entropy, rows))["loss"]
        found.append(float(torch.cat(list(losses.values())).mean()))
        learner.update()
    return found


@pytest.mark.bitsandbytes
def test_moments_in_8_bits_train_as_those_in_float32_do(tmp_path: Path) -> None:
    wide, narrow = learner_of(tmp_path, learning_rate=1e-3), learner_of(tmp_path, **NARROW)
    before = [parameter.detach().clone() for parameter in wide.policy.model.parameters()]
    reference, found = train(wide), train(narrow)
    assert reference[-1] < 0.5 * reference[0]
    assert found == pytest.approx(reference, rel=0.02)
    assert found != reference
    for start, one, other in zip(before, wide.policy.model.parameters(), narrow.policy.model.parameters(), strict=True):
        assert (one - other).norm() < 0.1 * (one - start).norm()


@pytest.mark.bitsandbytes
def test_the_moments_take_the_bytes_that_are_planned(tmp_path: Path) -> None:
    learner = learner_of(tmp_path, **NARROW)
    train(learner)
    model = learner.policy.model
    held = [value for values in learner.optimizer.state.values() for value in values.values() if value is not None]
    tensors = {id(value): value for value in held if isinstance(value, Tensor)}
    stage = Trained(shape_of_config(model.config.to_dict(), 0), {"optimizer": NARROW})
    assert sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(terms.moments(stage), rel=0.05)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and (state := learner.optimizer.state.get(module.weight)):
            tied = module.weight is model.get_input_embeddings().weight
            assert state["state1"].dtype == (torch.float32 if tied else torch.uint8)


@pytest.mark.bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_loaded_moments_are_paged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own loading puts them into the device's memory. Here a page is a mark on a tensor."""
    model = nn.Linear(64, 128)
    optimizers = [adamw(OptimizerConfig(**NARROW, paged=True), model, torch.device("cuda")) for _ in range(2)]
    paged = []

    def page(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        paged.append(torch.empty_like(parameter, dtype=dtype))
        return paged[-1]

    assert all(optimizer.is_paged for optimizer in optimizers)
    model(torch.ones(3, 64)).sum().backward()
    first, second = optimizers
    first.step()
    monkeypatch.setattr(second, "get_state_buffer", page)
    load_state(second, first.state_dict())
    assert [id(buffer) for buffer in paged] == [
        id(values[name]) for values in second.state.values() for name in ("state1", "state2")
    ]
    for parameter, kept in first.state.items():
        loaded = second.state[parameter]
        assert all(
            torch.equal(value, loaded[name]) if isinstance(value, Tensor) else value == loaded[name]
            for name, value in kept.items()
        )
    # On a CPU there is nothing to page.
    assert not adamw(OptimizerConfig(**NARROW, paged=True), model, torch.device("cpu")).is_paged


def test_without_bitsandbytes_the_setting_and_the_command_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "_is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"optimizer\.states: 8bit .* `make setup-bitsandbytes`"):
        adamw(OptimizerConfig(states="8bit"), nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.parametrize(("cuda", "backend"), [(True, "cuda:nccl,cpu:gloo"), (False, None)])
def test_processes_on_gpus_exchange_offloaded_tensors_by_gloo(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, backend: str | None
) -> None:
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **settings: asked.update(settings))
    device.accelerator(host_tensors=True)
    groups = [each for each in asked["kwargs_handlers"] if isinstance(each, InitProcessGroupKwargs)]
    assert [each.backend for each in groups] == ([backend] if backend else [])
