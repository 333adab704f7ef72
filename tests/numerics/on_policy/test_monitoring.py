"""The sampler of a monitor: the stage's own where it holds weights, the student's model elsewhere."""

from collections.abc import Sequence

import pytest

from evals.measure.monitor import Monitor
from stages.config.on_policy import MonitorConfig, RLConfig, SamplerConfig
from stages.learner.training import Learner
from stages.on_policy.monitoring import monitored
from stages.sampling.sampler import TransformersSampler
from stages.sampling.samples import Sample, Sampling
from tests.numerics.conftest import tiny_policy
from tests.support.chance import score_by_chance

STEP, EXAMPLES = 50, 6


class Engine(TransformersSampler):
    """A sampler with a context that holds weights of its own, and notes what happens to it."""

    def __init__(self, context: int | None) -> None:
        super().__init__(tiny_policy(1))
        self.context = context
        self.happened: list[str] = []

    def update_weights(self, policy, version: int) -> None:
        self.happened.append(f"weights {version}")
        super().update_weights(policy, version)

    def sample(self, prompts, group_size: int, sampling: Sampling, seed: int) -> list[list[Sample]]:
        self.happened.append(f"{len(prompts)} at {sampling.temperature:g}")
        return super().sample(prompts, group_size, sampling, seed)


@pytest.fixture
def scores(workspace, domains):
    """Scores of one policy, measured beside a sampler."""
    domains["sort"].score = score_by_chance
    monitor = Monitor({"sort": domains["sort"]}, MonitorConfig(every=STEP, examples=EXAMPLES), max_new_tokens=4)

    def measured(sampler: TransformersSampler | None, step: int = STEP, **settings: object) -> dict[str, float]:
        config = RLConfig(max_steps=1, sampler=SamplerConfig(**settings))
        learner = Learner(tiny_policy(0), config, 1, workspace("learner", {}, {}).progress, 0)
        return dict(monitored(monitor, learner, config, sampler, step))

    return measured


def happened(scores, context: int | None, **settings: object) -> Sequence[str]:
    engine = Engine(context)
    # Whoever samples, it is the student that is scored.
    assert scores(engine, **settings) == scores(None) and scores(None)["score/sort"] > 0
    return engine.happened


@pytest.mark.parametrize("backend", ["vllm", "vllm_server"])
def test_it_hands_the_weights_over_and_samples_greedily(scores, backend):
    assert happened(scores, 512, backend=backend) == [f"weights {STEP}", f"{EXAMPLES} at 0"]
    assert happened(scores, None, backend=backend) == [f"weights {STEP}", f"{EXAMPLES} at 0"]


def test_the_students_model_samples_where_the_engine_cannot(scores):
    # Its context is too short, it draws the next batch, or it is the student's model.
    assert happened(scores, 8, backend="vllm_server") == []
    assert happened(scores, 512, backend="vllm_server", ahead=True) == []
    assert happened(scores, None, backend="transformers") == []


def test_nothing_is_handed_over_between_measurements(scores):
    engine = Engine(512)
    assert scores(engine, step=STEP + 1, backend="vllm") == {} and engine.happened == []
