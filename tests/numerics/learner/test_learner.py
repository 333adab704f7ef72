"""What the learner says of an update is what it did, and what it is told to remember it remembers."""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from base.errors import UserError
from stages.config.training import OptimizerConfig, TrainConfig
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import TrainerSignal
from stages.sampling.samples import Sample
from tests.numerics.conftest import tiny_policy

LENGTHS = [5, 9, 3, 12, 7]


def make_learner(folder: Path, max_grad_norm: float = 1.0, micro_batch_tokens: int = 20) -> Learner:
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup_steps=2, max_grad_norm=max_grad_norm)
    return Learner(
        tiny_policy(0), TrainConfig(micro_batch_tokens=micro_batch_tokens, optimizer=optimizer), 6, folder, 0
    )


def learn(learner: Learner) -> None:
    """Accumulate the gradient of a few random rows, in micro-batches."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 100, (length + 4,), generator=generator).tolist() for length in LENGTHS]
    weights = token_weights(LENGTHS, "token", learner)
    rows = [Row(t, 4, w) for t, w in zip(tokens, weights, strict=True)]
    accumulate(learner, rows, partial(cross_entropy, rows))


def gradient(learner: Learner) -> Tensor:
    """All of it as one vector."""
    parts = [p.grad.flatten() for p in learner.policy.model.parameters() if p.grad is not None]
    return torch.cat(parts).clone()


@contextlib.contextmanager
def before_steps(look: Callable[[Optimizer], None]) -> Iterator[None]:
    """Look at the optimizer right before each of its steps."""
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: look(optimizer))
    yield
    hook.remove()


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_the_logged_norm_is_the_gradient_s_and_the_step_s_is_clipped(tmp_path: Path, limit: float) -> None:
    learner = make_learner(tmp_path, limit)
    learn(learner)
    before = gradient(learner)
    assert before.norm() > 0.1
    used: list[Tensor] = []
    with before_steps(lambda _: used.append(gradient(learner))):
        facts = learner.update()
    assert facts["grad_norm"] == pytest.approx(float(before.norm()), rel=1e-5)
    torch.testing.assert_close(used[0], before * min(1.0, limit / float(before.norm())), rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in learner.policy.model.parameters())


def test_the_logged_norm_does_not_depend_on_micro_batches(tmp_path: Path) -> None:
    norms = []
    for micro_batch_tokens in (16, 1000):
        learner = make_learner(tmp_path, micro_batch_tokens=micro_batch_tokens)
        learn(learner)
        norms.append(learner.update()["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_logged_rate_is_the_step_s_also_after_steps_without_signal(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    used: list[float] = []
    logged = []
    with before_steps(lambda adam: used.append(adam.param_groups[0]["lr"])):
        for update in range(6):
            if update == 3:
                learner.skip_update()
                continue
            learn(learner)
            logged.append(learner.update()["learning_rate"])
    assert used == logged
    # Two updates of warm-up from 0, then a line to 0 at the sixth; the fourth was skipped.
    assert logged == pytest.approx([0.0, 0.5e-3, 1e-3, 0.5e-3, 0.25e-3])


def test_memory_comes_back_with_the_state(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    learner.memory = {"health": {"best": 0.25, "since": 3, "seen": [1, 2]}}
    learner.save(3)
    again = make_learner(tmp_path)
    assert again.memory == {}
    assert again.resume() == 3
    assert again.memory == learner.memory


def test_a_state_from_before_there_was_memory_resumes_without(tmp_path: Path) -> None:
    learner = make_learner(tmp_path)
    learner.tokens = 7
    learner.save(3)
    (tmp_path / "step-3" / "stage.json").write_text(json.dumps({"tokens": 7}))
    again = make_learner(tmp_path)
    assert again.resume() == 3
    assert (again.tokens, again.memory) == (7, {})


def test_one_process_cannot_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sharding: fsdp .* resources\.gpus"):
        Learner(tiny_policy(0), TrainConfig(sharding="fsdp"), 6, tmp_path, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainers_log_probabilities_are_those_of_its_update(dtype, tmp_path):
    learner = Learner(tiny_policy(0), TrainConfig(dtype=dtype, micro_batch_tokens=20), 6, tmp_path, 0)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 100, (4,), generator=generator).tolist()
    samples = [
        Sample(prompt, torch.randint(5, 100, (n,), generator=generator).tolist(), torch.zeros(n), True) for n in LENGTHS
    ]
    rollout = Rollout(1, [], samples, [], [True] * len(samples), 1)
    rows = [Row(sample.tokens, 4, torch.ones(len(sample.completion_ids))) for sample in samples]
    judged = TrainerSignal(learner, 1.0).score(rollout, rows).trainer_logprobs
    found = accumulate(learner, rows, partial(cross_entropy, rows))["loss"]
    for i, logprobs_N in enumerate(judged):
        torch.testing.assert_close(-found[i], logprobs_N, rtol=1e-5, atol=1e-5)
