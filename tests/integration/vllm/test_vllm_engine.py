"""Real vLLM in the trainer's process; one process runs the whole scenario, for its start-up costs seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import base.extras
from base.errors import UserError
from base.extras import require_vllm
from stages.vllm.engine import EVALUATION
from stages.vllm.handover import Probe
from stages.vllm.settings import logprobs_mode
from tests.support import vllm_scenario

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the scenario saw."""
    done = subprocess.run(
        [sys.executable, vllm_scenario.__file__, str(tmp_path_factory.mktemp("vllm"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_greedy_tokens_are_those_of_transformers(facts, kind):
    for seen in facts[kind]:
        assert seen["greedy"]
        assert seen["greedy_gap"] < TOLERANCE
        assert seen["cut"]
        assert seen["cut_gap"] < TOLERANCE


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_engine_follows_the_weights(facts, kind):
    assert len(facts[kind]) == 1 + vllm_scenario.UPDATES
    for seen in facts[kind]:
        # At the temperature, of the weights it was given last, and not of those it will be given next.
        assert seen["gap"] < TOLERANCE
        assert seen["stale_gap"] > 0.1
        assert seen["long_gap"] < TOLERANCE


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_seed_draws_the_same_and_a_group_differs(facts, kind):
    for seen in facts[kind]:
        assert seen["repeats"]
        assert seen["distinct"] > 1
        assert seen["ended"]
        assert seen["nothing"] == []


@pytest.mark.vllm
def test_a_merge_samples_with_vllm_and_logs_how_far_it_is_from_the_trainer(facts):
    merge = facts["merge"]
    assert len(merge["metrics"]) == 4
    for values in merge["metrics"]:
        assert 0 < values["distill/mismatch"] <= values["distill/mismatch_max"] < TOLERANCE
    assert merge["metrics"][-1]["distill/reverse_kl"] < merge["metrics"][0]["distill/reverse_kl"]
    before, after = merge["notes"]
    assert before.startswith("preflight: sampler and trainer agree within")
    assert after.startswith("preflight after the first update: sampler and trainer agree within")
    assert merge["digest"] == facts["merge_again"]["digest"]
    assert "engine" not in merge["left"]


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_an_evaluation_by_vllm_has_the_greedy_completions_and_within_intervals_the_scores(facts, kind):
    by = {name: facts["evaluations"][f"{kind} {name}"] for name in ("transformers", "vllm")}
    for domain in ("sort", "reverse"):
        ours, theirs = by["transformers"][domain], by["vllm"][domain]
        assert len(ours) == 40
        for one, other in zip(ours, theirs, strict=True):
            assert (one["id"], one["greedy"], len(other["samples"])) == (other["id"], other["greedy"], 8)
        assert len({row["greedy"]["completion"] for row in theirs}) > 5
        means = [
            np.array([[drawn["score"] for drawn in row["samples"]] for row in rows]).mean(1) for rows in (ours, theirs)
        ]
        # Other random numbers draw other completions of the same policy.
        assert (means[0] != means[1]).any()
        gap = means[0] - means[1]
        assert abs(gap.mean()) < 4 * gap.std(ddof=1) / len(gap) ** 0.5
    assert facts["evaluations"][f"{kind} vllm left"] == [False, False]


@pytest.mark.vllm
def test_an_adapter_is_evaluated_and_not_its_base(facts):
    greedy = [
        [row["greedy"]["completion"] for row in facts["evaluations"][f"{kind} vllm"]["sort"]]
        for kind in ("full", "adapter")
    ]
    assert sum(one != other for one, other in zip(*greedy, strict=True)) > 20


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_monitor_scores_with_the_stages_engine_and_the_weights_of_its_step(facts, kind):
    seen = facts["monitored"][kind]
    # Before the first step, and after the second and the last.
    assert seen["asked"] == [30] * 3 and len(seen["curve"]) == 3
    assert seen["curve"][-1] == pytest.approx(seen["end"])
    assert len(set(seen["curve"])) > 1
    # It leaves no trace in the training.
    assert seen["traceless"]


@pytest.mark.vllm
def test_an_engine_left_behind_stops_the_stage_before_its_second_update(facts):
    assert facts["deaf"]["steps"] == 1
    error = facts["deaf"]["error"]
    assert re.search(r"deaf: preflight, domain 'sort': the sampler gives completion token .*: a gap of \S+ nats", error)
    assert "above the tolerance of 0.001" in error and "the sampler is vllm; sample with sampler.backend: tran" in error


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen3", "glm4"])
def test_the_experts_of_a_mixture_follow_too(facts, family):
    gaps = facts["moe"][family]
    assert len(gaps) == 3 and max(gaps) < TOLERANCE


@pytest.mark.vllm
def test_an_engine_without_the_students_weights_does_not_sample(facts):
    said = facts["refuses"]
    assert said["nothing given"].endswith("no weights were handed over yet")
    wrong = "model.layers.0.mlp.gate_proj.weight is [96, 64] in the student and [64, 64] in the engine"
    assert wrong in said["shape"] and "does not sample" in said["after shape"]
    # Weights that were refused before a byte was sent have harmed nothing.
    assert said["gap"] < TOLERANCE
    assert "cannot load the student's weights (OSError: the rest is gone)" in said["half"]
    assert "sampler.backend: transformers" in said["half"]
    for later in ("after half", "again", "after again"):
        assert "the rest is gone" in said[later]


@pytest.mark.vllm
def test_an_exported_adapter_is_loaded_by_vllm_as_it_is(facts):
    assert facts["exported"] is True


def test_without_vllm_the_error_names_the_key_and_the_extra(monkeypatch):
    monkeypatch.setattr(base.extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"merge\.sampler\.backend: vLLM is not installed; `make setup-vllm`"):
        require_vllm("merge.sampler.backend", gpus=0)


def test_an_engine_that_computes_something_else_names_what_asked_for_it():
    probe = Probe([1, 2, 3], 1, [-1.0, -1.0], 1e-3)
    probe.check([-1.0, -1.0005], EVALUATION.name, EVALUATION.key)
    message = r"evaluation's process took the weights, but .* 0\.25 nats a token .* Sample with evaluate\.backend: tran"
    with pytest.raises(UserError, match=message):
        probe.check([-1.5, -1.0], EVALUATION.name, EVALUATION.key)


def test_log_probabilities_vllm_cannot_tell_are_refused():
    assert logprobs_mode(1.0, 0.9) == "raw_logprobs"
    assert logprobs_mode(0.7, 1.0) == "processed_logprobs"
    with pytest.raises(UserError, match=r"temperature 0\.7 before top_p 0\.9"):
        logprobs_mode(0.7, 0.9)


@pytest.mark.vllm
def test_an_engine_s_context_is_what_the_longest_prompt_needs(facts):
    short, whole = facts["contexts"]["600"], facts["contexts"]["None"]
    assert (short[0], whole[0]) == (665, 8192)
    assert short[1] <= whole[1]
    assert (short[2], whole[2]) == (2048, 8192)
