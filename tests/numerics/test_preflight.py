"""The preflight of a merge: agreement is noted, a mismatch ends it and shows the token."""

import re

import pytest
import torch

from experts.errors import UserError
from stages.on_policy.distill_config import DistillConfig
from stages.on_policy.preflight import preflight
from stages.on_policy.sampler import Sample, TransformersSampler
from stages.on_policy.teachers import Routed, TeacherPool
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
    return student, TransformersSampler(student), TeacherPool(routes, store, student, config), examples, config


def test_agreement_is_noted_with_its_tolerance(merge):
    notes: list[str] = []
    preflight(*merge, notes.append)
    (line,) = notes
    assert "tolerance 0.001" in line
    gaps = [float(gap) for gap in re.findall(r"within ([0-9.e+-]+)", line)]
    assert len(gaps) == 2
    assert all(gap < 1e-4 for gap in gaps)


def test_a_teacher_scored_differently_shows_the_first_token(merge, monkeypatch):
    student, sampler, pool, examples, config = merge
    forward = TeacherPool._forward
    monkeypatch.setattr(
        TeacherPool, "_forward", lambda self, model, rows: [1.1 * part_NH for part_NH in forward(self, model, rows)]
    )
    with pytest.raises(UserError, match=r"'sort': one and two, scored as a teacher, gives completion token 0 \("):
        preflight(student, sampler, pool, examples, config, print)
    loose = config.model_copy(update={"preflight_tolerance": 100.0})
    notes: list[str] = []
    preflight(student, sampler, pool, examples, loose, notes.append)
    assert "tolerance 100" in notes[0]


def test_a_sampler_that_disagrees_shows_the_first_token(merge, monkeypatch):
    student, sampler, pool, examples, config = merge
    sample = sampler.sample

    def off(*arguments: object) -> list[list[Sample]]:
        drawn = sample(*arguments)
        drawn[0][0].logprobs_N[1] = torch.nan
        return drawn

    monkeypatch.setattr(sampler, "sample", off)
    with pytest.raises(UserError, match=r"the sampler gives completion token 1 .* log-probability nan"):
        preflight(student, sampler, pool, examples, config, print)


def test_in_bfloat16_the_trainers_own_forward_is_what_all_are_compared_with(store, checkpoint, domains):
    config = DistillConfig(max_new_tokens=8, dtype="bfloat16")
    student = tiny_policy(9)
    pool = TeacherPool({"sort": (Routed(checkpoint("one", 1)),)}, store, student, config)
    notes: list[str] = []
    preflight(
        student, TransformersSampler(student), pool, {"sort": domains["sort"].draw("train", 5, 0)}, config, notes.append
    )
    drawn, teachers = (float(gap) for gap in re.findall(r"within ([0-9.e+-]+)", notes[0]))
    # The sampler runs in float32, the trainer under autocast: a gap that is there must be told.
    assert 1e-4 < drawn < 0.25
    assert teachers < 1e-4
