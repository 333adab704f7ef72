"""Rejection-sampled fine-tuning: what passes is imitated, what does not is left alone."""

import torch

import stages.rft
from base.store.journal import read
from stages.config.on_policy import RFTConfig
from stages.on_policy.signals import SuccessSignal
from tests.numerics.on_policy.test_objectives import make_rollout, random_logits

PASSING = "abcdefgh"


class Picky:
    """Stands for a domain's scorer: a completion passes that begins with one of a few letters."""

    def __init__(self, domain):
        self.domain = domain

    def __getattr__(self, name):
        return getattr(self.domain, name)

    def score_all(self, pairs):
        return [float(completion[:1] in PASSING and bool(completion)) for _, completion in pairs]


def test_only_what_passes_matters():
    class Thirds:
        def score_all(self, pairs):
            return [0.5 * (1 + i) / len(pairs) for i, _ in enumerate(pairs)]

        def facts(self):
            return {}

    rollout = make_rollout(random_logits(0))
    signals = SuccessSignal({"sort": Thirds(), "reverse": Thirds()}, pass_score=0.5).score(rollout, [])
    assert signals.values["reward"] == [0.25, 0.5, 0.5]
    assert signals.advantages == [0.0, 1.0, 1.0]
    assert [signals.has_signal(row) for row in range(3)] == [False, True, True]


def test_imitating_what_passes_makes_more_of_it_pass(checkpoint, domains, workspace):
    config = RFTConfig(
        max_steps=25, examples=40, prompts_per_step=8, group_size=8, max_new_tokens=3, optimizer={"learning_rate": 3e-3}
    )
    place = workspace("expert", {"start": checkpoint("start", 0)}, {"sort": Picky(domains["sort"])})
    expert = stages.rft.train(config, place)
    values = [record["values"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "metrics"]
    rewards = torch.tensor([step["rft/reward"] for step in values])
    assert rewards[:3].mean() < 0.3
    assert rewards[-3:].mean() > rewards[:3].mean() + 0.3
    assert 0 < values[0]["rft/informative"] == values[0]["rft/reward"]
    assert expert.digest != place.parents["start"].digest
