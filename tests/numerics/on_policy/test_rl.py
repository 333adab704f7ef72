"""RL's KL penalty: the exact reverse KL against the start beside the reward."""

import torch

import stages.rl
from base.store.journal import read
from experts.domain import Domain
from experts.isolation.untrusted import Losses, VerifierLostError
from stages.config.on_policy import RLConfig

LIKED = "abcdefgh"


class FirstLetter:
    """Stands for a domain's scorer: a completion is good that begins with one of a few letters."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def __getattr__(self, name: str):
        return getattr(self.domain, name)

    def score_all(self, pairs):
        return [float(completion[:1] in LIKED and bool(completion)) for _, completion in pairs]


class Indifferent(FirstLetter):
    """Every completion is as good as any other: a group tells nothing."""

    def score_all(self, pairs):
        return [1.0 for _ in pairs]


def journal(place) -> list[dict[str, float]]:
    return [record["values"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "metrics"]


def settings(**more) -> RLConfig:
    small = {"max_steps": 12, "examples": 40, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 3}
    return RLConfig(**small, optimizer={"learning_rate": 3e-3}, **more)


def test_a_penalty_keeps_the_policy_near_its_start(checkpoint, domains, workspace):
    start, near = checkpoint("start", 0), {}
    for weight in (0.001, 3.0):
        place = workspace(f"expert-{weight}", {"start": start}, {"sort": FirstLetter(domains["sort"])})
        stages.rl.train(settings(reference_kl=weight), place)
        near[weight] = journal(place)
    assert near[3.0][0]["rl/reference_kl"] == 0.0
    far, held = near[0.001][-1], near[3.0][-1]
    assert far["rl/reference_kl"] > 10 * held["rl/reference_kl"] > 0
    assert far["rl/reward"] > held["rl/reward"]


def test_the_penalty_alone_moves_nothing_from_the_start(checkpoint, domains, workspace):
    start = checkpoint("start", 0)
    place = workspace("expert", {"start": start}, {"sort": Indifferent(domains["sort"])})
    expert = stages.rl.train(settings(reference_kl=1.0), place)
    values = journal(place)
    assert max(abs(step["rl/reference_kl"]) for step in values) < 1e-6
    assert expert.manifest["metrics"] != {}
    assert torch.isfinite(torch.tensor([step["rl/entropy"] for step in values])).all()


def test_the_default_has_no_place_in_the_key():
    assert "reference_kl" not in RLConfig().key_fields()
    assert RLConfig(reference_kl=0.01).key_fields()["reference_kl"] == 0.01


class Lossy(FirstLetter):
    """Loses its verifier at one completion of each call."""

    def __init__(self, domain: Domain) -> None:
        super().__init__(domain)
        self.losses = Losses("sort")

    def score_all(self, pairs):
        self.losses.add(VerifierLostError("no answer within 5 s"))
        return super().score_all(pairs)

    def facts(self):
        return self.losses.facts()

    def news(self):
        return self.losses.news()


def test_a_lost_verifier_is_an_alarm_of_its_step(checkpoint, domains, workspace):
    place = workspace("expert", {"start": checkpoint("start", 0)}, {"sort": Lossy(domains["sort"])})
    stages.rl.train(settings().model_copy(update={"max_steps": 2}), place)
    notes = [record for record in read(place.folder / "journal.jsonl") if record["kind"] == "note"]
    alarms = [note for note in notes if note["text"].startswith("alarm: ")]
    assert [(note["step"], note["text"].partition(" scored 0")[0]) for note in alarms] == [
        (step, "alarm: domains.sort: 1 completion(s)") for step in (1, 2)
    ]
    assert [step["rl/verifier_lost/sort"] for step in journal(place)] == [1.0, 2.0]
