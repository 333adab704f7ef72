"""The learning curve: measured when it is due, by the evaluation's own numbers, without a trace in the training."""

import pytest
import torch

from base.errors import UserError
from evals.measure.evaluate import EvaluationRequest, evaluate
from evals.measure.monitor import Monitor
from experts.domain import HELD_OUT
from experts.loading import load_domain
from stages.config.evaluation import EvaluationConfig
from stages.config.on_policy import MonitorConfig
from tests.numerics.conftest import tiny_policy
from tests.support.chance import score_by_chance


def test_it_measures_before_the_first_step_and_when_it_is_due(domains):
    monitor = Monitor(domains, MonitorConfig(every=3, examples=2), max_new_tokens=4)
    policy = tiny_policy(0)
    due = [step for step in range(8) if monitor(policy, step)]
    assert due == [0, 3, 6]
    assert set(monitor(policy, 0)) == {"score/sort", "score/reverse", "score/uppercase"}


def test_it_gives_the_evaluations_greedy_score(store, workspace, checkpoint, domains):
    """A random model scores 0 everywhere, so the domain here rewards something that it does by chance."""
    sort = domains["sort"]
    sort.score = score_by_chance
    parent = checkpoint("model", 3)
    place = workspace("eval", {"checkpoint": parent}, {"sort": sort})
    config = EvaluationConfig(examples=9, samples=0, max_new_tokens=6)
    (artifact,) = evaluate([EvaluationRequest(place, config, "sort", HELD_OUT)], parent, store)
    found = Monitor({"sort": sort}, MonitorConfig(examples=9), max_new_tokens=6)(tiny_policy(3), 0)
    assert found["score/sort"] == pytest.approx(artifact.manifest["metrics"]["greedy"])
    assert 0 < found["score/sort"] < 1


def test_it_touches_neither_weights_nor_random_numbers(domains):
    policy = tiny_policy(0)
    monitor = Monitor(domains, MonitorConfig(examples=3), max_new_tokens=4)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = monitor(policy, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert monitor(policy, 50) == first


def test_prompts_are_encoded_once(domains, monkeypatch):
    encoded = []

    def counting(tokenizer, prompt):
        encoded.append(prompt)
        return list(tokenizer(prompt)["input_ids"])

    monkeypatch.setattr("evals.measure.monitor.encode_prompt", counting)
    monitor = Monitor({"sort": domains["sort"]}, MonitorConfig(examples=5), max_new_tokens=3)
    for step in (0, 50, 100):
        monitor(tiny_policy(0), step)
    assert len(encoded) == 5


def test_a_domain_that_is_too_small_is_named():
    small = load_domain("short", "strings", {"task": "sort", "min_length": 2, "max_length": 2})
    with pytest.raises(UserError, match="short"):
        Monitor({"short": small}, MonitorConfig(examples=100), max_new_tokens=3)
