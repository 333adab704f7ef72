"""The preflight of on-policy stages: agreement is noted, a mismatch ends the stage and shows the token."""

import copy
import dataclasses
import json
import re

import pytest
import torch

import stages.distill
import stages.rft
import stages.rl
from base.errors import UserError
from base.store.journal import read
from flows.engines.worker import USER_ERROR, exit_code_of
from stages.config.distill import DistillConfig
from stages.config.on_policy import RFTConfig, RLConfig, SamplerConfig
from stages.losses.log_probabilities import token_logprobs
from stages.on_policy.preflight import SamplerCheck, preflight
from stages.rows.trained_on import TrainedOn
from stages.sampling.agreement import plain_logits
from stages.sampling.sampler import TransformersSampler
from stages.sampling.samples import Sample
from stages.teachers.remote_teachers import RemoteScores, TopLogprobs
from stages.teachers.residency import Residents
from stages.teachers.scoring import Routed, TeacherPool
from tests.numerics.conftest import tiny_policy


@pytest.fixture
def merge(store, checkpoint, domains):
    """Student, pool, examples and config of a small merge; one domain has two teachers."""
    config = DistillConfig(max_new_tokens=8, temperature=0.8)
    routes = {
        "sort": (Routed(checkpoint("one", 1), 2.0), Routed(checkpoint("two", 2), 1.0)),
        "reverse": (Routed(checkpoint("three", 3)),),
    }
    student = tiny_policy(9)
    examples = {name: domains[name].draw("train", 5, 0) for name in routes}
    check = SamplerCheck("student", student, TransformersSampler(student), examples, config)
    return check, TeacherPool(routes, store, student, config), config


def test_agreement_is_noted_with_its_tolerance(merge):
    notes: list[str] = []
    preflight(*merge, notes.append)
    (line,) = notes
    assert "tolerance 0.001" in line
    gaps = [float(gap) for gap in re.findall(r"within ([0-9.e+-]+)", line)]
    assert len(gaps) == 2
    assert all(gap < 1e-4 for gap in gaps)


def test_a_teacher_scored_differently_shows_the_first_token(merge, monkeypatch):
    check, pool, config = merge
    forward = TeacherPool._forward
    monkeypatch.setattr(
        TeacherPool, "_forward", lambda self, model, rows: [1.1 * part_NH for part_NH in forward(self, model, rows)]
    )
    with pytest.raises(UserError, match=r"'sort': one and two, scored as a teacher, gives completion token 0 \("):
        preflight(check, pool, config, print)
    loose = config.model_copy(update={"preflight_tolerance": 100.0})
    notes: list[str] = []
    preflight(dataclasses.replace(check, config=loose), pool, loose, notes.append)
    assert "tolerance 100" in notes[0]


def test_a_sampler_that_disagrees_shows_the_first_token(merge, monkeypatch):
    check, pool, config = merge
    sampler = check.sampler
    sample = sampler.sample

    def off(*arguments: object) -> list[list[Sample]]:
        drawn = sample(*arguments)
        drawn[0][0].logprobs_N[1] = torch.nan
        return drawn

    monkeypatch.setattr(sampler, "sample", off)
    with pytest.raises(UserError, match=r"the sampler gives completion token 1 .* log-probability nan"):
        preflight(check, pool, config, print)


def test_in_bfloat16_the_trainers_own_forward_is_what_all_are_compared_with(store, checkpoint, domains):
    config = DistillConfig(max_new_tokens=8, dtype="bfloat16")
    student = tiny_policy(9)
    pool = TeacherPool({"sort": (Routed(checkpoint("one", 1)),)}, store, student, config)
    notes: list[str] = []
    examples = {"sort": domains["sort"].draw("train", 5, 0)}
    preflight(
        SamplerCheck("student", student, TransformersSampler(student), examples, config), pool, config, notes.append
    )
    drawn, teachers = (float(gap) for gap in re.findall(r"within ([0-9.e+-]+)", notes[0]))
    # The sampler runs in float32, the trainer under autocast: a gap that is there must be told.
    assert 1e-4 < drawn < 0.25
    assert teachers < 1e-4


class Stale(TransformersSampler):
    """Samples with a copy of the student; from some version on it takes no more weights, and reports that it did."""

    def __init__(self, policy, last):
        super().__init__(copy.deepcopy(policy))
        self.last = last

    def update_weights(self, policy, version):
        if version <= self.last:
            self.policy = copy.deepcopy(policy)
        self.version = version


class Sharp(TransformersSampler):
    """Samples with other weights from the start."""

    def update_weights(self, policy, version):
        self.policy, self.version = copy.deepcopy(policy), version
        with torch.no_grad():
            self.policy.head_VH.mul_(1.1)


STEPS = {"max_steps": 5, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 6, "examples": 40}
TUNED = {"optimizer": {"learning_rate": 1e-2}, "sampler": SamplerConfig(backend="vllm")}
# One that passes half of what is drawn, so that every step has something to learn from.
STAGES = {
    "rl": (stages.rl, RLConfig(**STEPS, **TUNED)),
    "rft": (stages.rft, RFTConfig(**STEPS, **TUNED)),
    "distill": (stages.distill, DistillConfig(**STEPS, **TUNED)),
}


def run_stage(name, workspace, checkpoint, domains, monkeypatch, make, **changes):
    """Run a stage whose sampler is another; returns its journal, whatever comes of it, and the error."""
    module, config = STAGES[name]
    config = config.model_copy(update=changes)
    sort = domains["sort"]
    monkeypatch.setattr(sort, "score_all", lambda pairs: [float(ord(text[-1:] or "a") % 2) for _, text in pairs])
    monkeypatch.setattr(module, "make_sampler", lambda config, learner, *rest: make(learner.policy))
    seeds = {"start": 1, "teacher/sort": 2} if name == "distill" else {"start": 1}
    known = workspace("place", {}, {}).store.find
    parents = {role: known(role[:5]) or checkpoint(role[:5], seed) for role, seed in seeds.items()}
    place, error = workspace(f"experts-{name}", parents, {"sort": sort}), None
    try:
        module.train(config, place)
    except UserError as found:
        error = found
    journal = place.folder / "journal.jsonl"
    return list(read(journal)) if journal.exists() else [], error


def notes(records):
    return [record["text"] for record in records if record["kind"] == "note"]


@pytest.mark.parametrize("name", STAGES)
def test_a_sampler_that_is_off_stops_any_stage_before_its_first_step(name, workspace, checkpoint, domains, monkeypatch):
    records, error = run_stage(name, workspace, checkpoint, domains, monkeypatch, Sharp)
    assert records == [] and exit_code_of(error) == USER_ERROR
    found = re.search(
        r"log-probability (\S+), the model's own forward pass (\S+): a gap of (\S+) nats, above", str(error)
    )
    theirs, own, gap = (float(value) for value in found.groups())
    assert gap > 1e-3 and gap == pytest.approx(abs(theirs - own), abs=2e-4)
    for part in (
        f"experts-{name}: preflight, domain 'sort': the sampler gives",
        "tolerance of 0.001",
        "is vllm; sample",
    ):
        assert part in str(error)
    loose, error = run_stage(name, workspace, checkpoint, domains, monkeypatch, Sharp, preflight_tolerance=10.0)
    assert error is None and notes(loose)[0].startswith("preflight: sampler and trainer agree within")


@pytest.mark.parametrize("name", STAGES)
def test_a_sampler_that_does_not_take_changed_weights_stops_any_stage_before_its_second_update(
    name, workspace, checkpoint, domains, monkeypatch
):
    records, error = run_stage(name, workspace, checkpoint, domains, monkeypatch, lambda policy: Stale(policy, 0))
    assert exit_code_of(error) == USER_ERROR and "the sampler gives" in str(error)
    (first,) = [record for record in records if record["kind"] == "metrics"]
    assert f"{name}/grad_norm" in first["values"]


@pytest.mark.parametrize("name", STAGES)
def test_a_sampler_that_follows_is_checked_twice_and_no_more(name, workspace, checkpoint, domains, monkeypatch):
    records, error = run_stage(name, workspace, checkpoint, domains, monkeypatch, lambda policy: Stale(policy, 99))
    assert error is None
    before, after = [line for line in notes(records) if "preflight" in line]
    assert before.startswith("preflight: sampler and trainer agree within")
    assert after.startswith("preflight after the first update: sampler and trainer agree within")


def test_the_trainers_own_model_needs_no_second_check(workspace, checkpoint, domains, monkeypatch):
    own = SamplerConfig(backend="transformers")
    records, error = run_stage("rl", workspace, checkpoint, domains, monkeypatch, TransformersSampler, sampler=own)
    assert error is None
    assert [line for line in notes(records) if "preflight" in line] == notes(records)[:1]


def test_weights_that_were_not_changed_yet_are_not_what_the_second_check_is_about(
    workspace, checkpoint, domains, monkeypatch
):
    """A step without anything to learn from changes nothing; the check waits for one that does."""
    rewards = iter([0.0, 0.0, 0.5, 0.5, 0.5])
    seen = []
    again = SamplerCheck.again
    monkeypatch.setattr(SamplerCheck, "again", lambda self: seen.append(self.sampler.version) or again(self))

    def some(pairs):
        share = next(rewards)
        return [float(share > 0 and row % 2) for row, _ in enumerate(pairs)]

    module, config = STAGES["rl"]
    monkeypatch.setattr(domains["sort"], "score_all", some)
    monkeypatch.setattr(module, "make_sampler", lambda config, learner, *rest: Stale(learner.policy, 99))
    module.train(config, workspace("skipping", {"start": checkpoint("start", 1)}, {"sort": domains["sort"]}))
    assert seen == [3]


class Servers:
    """Stands for servers of the teachers; may score rows of a longer batch differently."""

    def __init__(self, policies, off=0.0):
        self.policies, self.off, self.batches = policies, off, []

    def score(self, rows, keys, device):
        self.batches.append(len(rows))
        reported = []
        for row, key in zip(rows, keys, strict=True):
            drawn = Sample(list(row.tokens[: row.start]), list(row.targets), torch.zeros(row.scored), False)
            logits_NV = plain_logits(self.policies[key].model, drawn, "float32")
            values_N = token_logprobs(logits_NV, torch.tensor(row.targets)) - self.off * (len(rows) > 1)
            by_id = [{token: float(value)} for token, value in zip(row.targets, values_N, strict=True)]
            reported.append(TopLogprobs.of(by_id, row.targets, 1, logits_NV.shape[1]))
        return RemoteScores(reported, logits_NV.shape[1], {}, device)


def served_merge(store, checkpoint, domains, off=0.0):
    """As `merge`, with its teachers on servers."""
    config = DistillConfig(max_new_tokens=8, objective="sampled_reverse_kl", teacher_backend="vllm_server")
    routes = {"sort": (Routed(checkpoint("one", 1)),), "reverse": (Routed(checkpoint("three", 3)),)}
    policies = {"one": tiny_policy(1), "three": tiny_policy(3)}
    student, servers = tiny_policy(9), Servers(policies, off)
    examples = {name: domains[name].draw("train", 5, 0) for name in routes}
    check = SamplerCheck("student", student, TransformersSampler(student), examples, config)
    return check, TeacherPool(routes, store, student, config, remote=servers), config


def test_teachers_on_servers_are_never_loaded_here(store, checkpoint, domains, monkeypatch):
    monkeypatch.setattr(Residents, "activated", lambda *arguments: pytest.fail("a teacher was loaded"))
    check, pool, config = served_merge(store, checkpoint, domains)
    notes: list[str] = []
    preflight(check, pool, config, notes.append)
    assert pool.remote.batches == [2, 1, 1] * 2
    assert "teachers' servers, asked for rows together and alone, agree within" in notes[0]


def test_servers_that_score_a_batch_differently_from_its_rows_stop_the_stage(store, checkpoint, domains):
    check, pool, config = served_merge(store, checkpoint, domains, off=0.01)
    message = r"'sort': one, scored as a teacher, gives completion token 0 .*, the teacher's server for this row alone"
    with pytest.raises(UserError, match=message):
        preflight(check, pool, config, print)


def test_a_served_teacher_of_another_vocabulary_is_refused_by_its_config(store, workspace):
    staged = store.staging("one")
    tiny_policy(1).save(staged)
    config = json.loads((staged / "config.json").read_text())
    (staged / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    teacher = workspace("one", {}, {}).commit(staged, trained_on=TrainedOn(), metrics={})
    settings = DistillConfig(objective="sampled_reverse_kl", teacher_backend="vllm_server")
    ours = config["vocab_size"]
    with pytest.raises(UserError, match=rf"merge.teachers.sort: teacher one has {ours + 8} output tokens, .* {ours}"):
        TeacherPool({"sort": (Routed(teacher),)}, store, tiny_policy(9), settings, remote=Servers({}))
