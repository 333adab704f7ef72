"""Scores are kept per example, paired over checkpoints, and flagged where the checkpoint was trained on the source."""

import json

import pytest
from pydantic import ValidationError

from base.store.checkpoint import Artifact
from base.store.journal import read
from evals.comparison.scores import read_scores
from evals.measure.evaluate import EvaluationRequest, evaluate
from experts.domain import HELD_OUT, OUT_OF_DISTRIBUTION
from experts.loading import load_domain
from stages.config.evaluation import EvaluationConfig
from stages.rows.trained_on import TrainedOn
from tests.numerics.conftest import tiny_policy
from tests.support.chats import make_policy

CONFIG = EvaluationConfig(examples=12, samples=3, max_new_tokens=10)


def test_rows_are_paired_and_scored_by_the_domain(store, workspace, checkpoint, domains):
    sheets = []
    for seed in (0, 1):
        parent = checkpoint(f"model{seed}", seed)
        request = EvaluationRequest(
            workspace(f"eval{seed}", {"checkpoint": parent}, {"sort": domains["sort"]}), CONFIG, "sort", HELD_OUT
        )
        (artifact,) = evaluate([request], parent, store)
        sheets.append(read_scores(artifact.path, "sort", HELD_OUT))
        assert "trained_on" not in artifact.manifest
    first, second = sheets
    assert first.ids == second.ids
    assert len(first.ids) == 12
    assert first.samples_NK.shape == (12, 3)
    examples = {example.id: example for example in domains["sort"].draw(HELD_OUT, 12, 0)}
    for row in first.rows:
        assert row["greedy"]["score"] == domains["sort"].score(examples[row["id"]], row["greedy"]["completion"])
        assert all(drawn["tokens"] <= 10 for drawn in row["samples"])
    assert first.rows != second.rows


def test_what_follows_a_stop_string_is_not_scored(store, workspace, domains):
    folder = store.staging("model")
    make_policy("llama3").save(folder)
    parent = workspace("model", {}, {}).commit(folder, trained_on=TrainedOn(), metrics={})

    def rows(name: str, stop: tuple[str, ...]) -> list[dict]:
        place = workspace(name, {"checkpoint": parent}, {"sort": domains["sort"]})
        config = CONFIG.model_copy(update={"stop": stop})
        (artifact,) = evaluate([EvaluationRequest(place, config, "sort", HELD_OUT)], parent, store)
        return [json.loads(line)["greedy"] for line in (artifact.path / "scores.jsonl").read_text().splitlines()]

    free = rows("free", ())
    stop = max((row["completion"] for row in free), key=len)[1:2]
    assert stop
    for whole, part in zip(free, rows("cut", (stop,)), strict=True):
        assert part["completion"] == whole["completion"].partition(stop)[0]
        assert part["truncated"] == (whole["truncated"] and stop not in whole["completion"])
    assert any(stop in row["completion"] for row in free)


def test_stop_strings_are_part_of_the_key_where_there_are_some():
    assert "stop" not in CONFIG.key_fields()
    assert EvaluationConfig(stop=("Q:",)).key_fields()["stop"] == ["Q:"]
    with pytest.raises(ValidationError, match=r"stop\.0"):
        EvaluationConfig(stop=("",))


@pytest.mark.parametrize("split", [HELD_OUT, OUT_OF_DISTRIBUTION])
def test_functions_trained_on_are_flagged(store, workspace, split):
    domain = load_domain("code", "code_edit", {"held_out_families": ["swapped_operands"]})
    drawn = domain.draw(split, 12, 0)
    seen = sorted({example.source for example in drawn})[:4]
    trained = TrainedOn.of({"code": domain}, {"code": [example for example in drawn if example.source in seen]})
    place = workspace("trained", {}, {"code": domain})
    folder = store.staging("trained")
    tiny_policy(0).save(folder)
    parent = place.commit(folder, trained_on=trained, metrics={})
    # What its start was trained on counts as well.
    folder = store.staging("child")
    tiny_policy(0).save(folder)
    child = workspace("child", {"start": parent}, {}).commit(folder, trained_on=TrainedOn(), metrics={})
    config = EvaluationConfig(examples=12, samples=0, max_new_tokens=4)
    request = EvaluationRequest(workspace("eval", {"checkpoint": child}, {"code": domain}), config, "code", split)
    (artifact,) = evaluate([request], child, store)
    rows = [json.loads(line) for line in (artifact.path / "scores.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows if row["contaminated"]} == set(seen)
    assert artifact.manifest["metrics"]["contaminated"] == sum(row["contaminated"] for row in rows) / 12 > 0
    assert "sampled" not in artifact.manifest["metrics"]


def test_what_an_import_was_trained_on_is_unknown_but_for_what_was_trained_here(store, workspace, domains):
    sort = domains["sort"]
    renamed = load_domain("order", "strings", {"task": "sort"})
    drawn = renamed.draw(HELD_OUT, 3, 0)
    folder = store.staging("base")
    tiny_policy(0).save(folder)
    base = workspace("base", {}, {}).commit(folder, trained_on=TrainedOn(unknown=("base",)), metrics={})
    folder = store.staging("child")
    tiny_policy(0).save(folder)
    place = workspace("child", {"start": base}, {"order": renamed})
    child = place.commit(folder, trained_on=TrainedOn.of({"order": renamed}, {"order": drawn}), metrics={})

    def scored(name: str, parent: Artifact) -> tuple[list[dict], dict]:
        request = EvaluationRequest(workspace(name, {"checkpoint": parent}, {"sort": sort}), CONFIG, "sort", HELD_OUT)
        (artifact,) = evaluate([request], parent, store)
        lines = (artifact.path / "scores.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], artifact.manifest["metrics"]

    rows, metrics = scored("eval-base", base)
    assert {row["contaminated"] for row in rows} == {None} and not [name for name in metrics if "contam" in name]
    rows, metrics = scored("eval-child", child)
    seen = {example.prompt for example in drawn}
    assert {row["prompt"]: (row["contaminated"], row["copy"]) for row in rows} == {
        row["prompt"]: (True, "prompt") if row["prompt"] in seen else (None, "") for row in rows
    }
    assert metrics["contaminated_at_least"] == 3 / 12 and "contaminated" not in metrics


def test_what_scoring_tells_of_the_scorer_is_among_the_metrics(store, workspace, checkpoint, domains):
    sort = domains["sort"]
    calls = []
    sort.score_all = lambda pairs: calls.append(pairs) or [n / len(pairs) for n in range(len(pairs))]
    sort.facts = lambda: {"judge_noise": 0.25}
    sort.news = lambda: ["one verifier was lost"]
    parent = checkpoint("model", 0)
    place = workspace("eval", {"checkpoint": parent}, {"sort": sort})
    (artifact,) = evaluate([EvaluationRequest(place, CONFIG, "sort", HELD_OUT)], parent, store)
    assert artifact.manifest["metrics"]["judge_noise"] == 0.25
    notes = [record["text"] for record in read(place.folder / "journal.jsonl") if record["kind"] == "note"]
    assert notes == ["alarm: one verifier was lost"]
    (pairs,) = calls
    rows = [json.loads(line) for line in (artifact.path / "scores.jsonl").read_text().splitlines()]
    kept = [
        (row["id"], drawn["completion"], drawn["score"]) for row in rows for drawn in (row["greedy"], *row["samples"])
    ]
    assert kept == [(example.id, text, n / 48) for n, (example, text) in enumerate(pairs)]
