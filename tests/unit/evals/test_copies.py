"""What a checkpoint and its ancestors were trained on is recorded as hashes, and copies are found in it."""

import json
import random

import numpy as np
import pytest

from base.store.checkpoint import Artifact, Store
from evals.comparison.copies import NEAR, NONE, PROMPT, UNIT, Copies
from experts.domain import HELD_OUT, TRAIN, Example
from experts.kinds.strings import TASKS
from experts.loading import load_domain
from flows.check.copies import copy_warnings
from flows.plan.graph import build_graph
from stages.learner.workspace import Workspace
from stages.rows.trained_on import FILE, TrainedOn, together
from tests.unit.flows.run_file.test_config import load

SORT, CODE = load_domain("sort", "strings", {"task": "sort"}), load_domain("code", "code_edit", {})
WORDS = [
    "river",
    "stone",
    "cloud",
    "amber",
    "field",
    "cedar",
    "lantern",
    "harbour",
    "meadow",
    "copper",
    "saddle",
    "violet",
    "thunder",
    "canyon",
    "ribbon",
]


def asked(prompt, answer="x", domain="sort", source=None) -> Example:
    return Example(prompt, answer, domain, source or json.dumps(prompt))


def kinds(trained: list[Example], held_out: list[Example], domain=SORT) -> list[str]:
    return Copies(TrainedOn.of({"sort": SORT}, {"sort": trained})).find(domain, held_out)


def story(seed: int, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [rng.choice(WORDS) + rng.choice(("s", "ed", "ing", "")) for _ in range(words)]


def commit(store: Store, key: str, trained: TrainedOn | None, parents=None) -> Artifact:
    folder = store.staging(key)
    (folder / "weights").write_text(key)
    return Workspace(store, key, key, 0, parents or {}, {}, {}).commit(folder, trained_on=trained, metrics={})


def test_a_copy_is_found_under_another_domain_s_name():
    trained = [asked("What is 3 + 4?", "7"), asked("Which?\nA. cow\nB. dog", "A")]
    other = load_domain("sums", "strings", {"task": "reverse"})
    held_out = [asked("what is  3 + 4", "7", "sums"), asked("Which?\nA. dog\nB. cow", "B", "sums")]
    assert kinds(trained, held_out, other) == [PROMPT, PROMPT]
    assert kinds(trained, [asked("What is 3 - 4?", "7")], other) == [NONE]


def test_case_counts_where_answers_differ_in_nothing_else():
    trained = [asked("swap KoTap:", "kOtAP"), asked("Say yes", "yes")]
    assert kinds(trained, [asked("swap kotap:", "KOTAP"), asked("swap kotap:", "kOtAP")]) == [NONE, PROMPT]
    assert kinds(trained, [asked("SAY YES", "yes")]) == [PROMPT]


@pytest.mark.parametrize("task", TASKS)
def test_generated_tasks_raise_no_false_alarm(task):
    domain = load_domain("d", "strings", {"task": task})
    copies = Copies(TrainedOn.of({"d": domain}, {"d": domain.draw(TRAIN, 300, 0)}))
    assert set(copies.find(domain, domain.draw(HELD_OUT, 60, 0))) == {NONE}


def test_a_near_copy_has_most_words_and_the_same_numbers():
    words = [*story(0), "17"]
    changed = [*words[:20], "another", *words[21:]]
    trained = [asked(" ".join(words)), *(asked(" ".join(story(n))) for n in range(1, 50))]
    found = kinds(
        trained, [asked(" ".join(changed)), asked(" ".join([*changed[:-1], "18"])), asked(" ".join(story(99)))]
    )
    assert found == [NEAR, NONE, NONE]


def test_a_template_makes_no_near_copies():
    template = " ".join(story(0, 60))
    trained = [asked(f"{template}\n{' '.join(story(n, 6))}") for n in range(1, 60)]
    assert set(kinds(trained, [asked(f"{template}\n{' '.join(story(n, 6))}") for n in range(100, 130)])) == {NONE}


def test_a_short_prompt_is_no_near_copy():
    assert kinds([asked("sort these nine big red apples")], [asked("sort these nine big red pears")]) == [NONE]


def test_a_function_trained_on_is_the_same_unit_in_all_domains_of_functions():
    twin = load_domain("twin", "code_edit", {"prompt_style": "instruct"})
    function = [asked("fix: a", domain="code", source="f1")]
    copies = Copies(TrainedOn.of({"code": CODE}, {"code": function}))
    assert copies.find(twin, [asked("fix: b", domain="twin", source="f1")]) == [UNIT]
    # Another kind may number its examples.
    assert copies.find(SORT, [asked("fix: b", source="f1")]) == [NONE]


def test_shots_and_system_prompts_are_no_part_of_what_is_compared(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"How many legs have {n} cows?", "a": str(4 * n)}) + "\n" for n in range(60))
    )
    options = {"path": str(path), "prompt_field": "q", "answer_field": "a"}
    plain = load_domain("plain", "hub", options)
    shots = load_domain("shots", "hub", options | {"few_shot": 2, "system": "Count."})
    trained = Copies(TrainedOn.of({"shots": shots}, {"shots": shots.draw_up_to(100, TRAIN, 0)}))
    seen = {str(example.question) for example in shots.draw_up_to(100, TRAIN, 0)}
    drawn = plain.draw_up_to(100, TRAIN, 0)
    found = dict(zip((example.prompt for example in drawn), trained.find(plain, drawn), strict=True))
    assert found == {prompt: PROMPT if prompt in seen else NONE for prompt in found} and len(seen) == len(found) - 2


def test_a_checkpoint_records_all_its_ancestors_once(tmp_path):
    store = Store(tmp_path)
    sort = TrainedOn.of({"sort": SORT}, {"sort": [asked("a b c d")]})
    more = TrainedOn.of({"sort": SORT}, {"sort": [asked("e f g h")]})
    start = commit(store, "start", sort)
    teacher = commit(store, "teacher", more, {"start": start})
    student = commit(store, "student", TrainedOn(), {"start": start, "teacher/sort": teacher})
    read = TrainedOn.read(student)
    assert read.groups.keys() == {*sort.groups, *more.groups} and not read.unknown
    assert Copies(read).find(SORT, [asked("E f g h.", source="1"), asked("i", source="2")]) == [PROMPT, NONE]
    assert "a b c d" not in json.dumps(student.manifest) and "sources" not in student.manifest
    again = commit(store, "again", TrainedOn(), {"start": start, "teacher/sort": teacher})
    assert again.manifest["files"][FILE] == student.manifest["files"][FILE]


def test_what_is_not_recorded_stays_unknown_in_all_descendants(tmp_path):
    store = Store(tmp_path)
    clean = commit(store, "clean", TrainedOn())
    imported = commit(store, "base", TrainedOn(unknown=("base",)))
    # A release before the record had the texts of its sources in the manifest.
    older = commit(store, "older", None)
    assert TrainedOn.read(clean).unknown == ()
    assert TrainedOn.read(older).unknown == ("older",)
    child = commit(store, "child", TrainedOn(), {"start": imported, "teacher/sort": older})
    assert TrainedOn.read(child).unknown == ("base", "older")


def test_an_empty_record_has_no_file(tmp_path):
    assert not (commit(Store(tmp_path), "clean", TrainedOn()).path / FILE).exists()
    assert together([]) == TrainedOn()
    record = TrainedOn.of({"sort": SORT}, {"sort": [asked("a")]})
    assert all(len(prompts.sketches_S) == 0 and prompts.ends_N.dtype == np.int64 for prompts in record.groups.values())


def test_the_plan_counts_copies_before_anything_is_trained(tmp_path):
    graph = build_graph(load(tmp_path), tmp_path)
    trained, clean = [asked("sort up 1 2 3:")], [asked("sort up 2 1 3:")]
    draws = {("sort", TRAIN): trained, ("sort", HELD_OUT): [*clean, asked("Sort  up 1 2 3:")]}
    (line,) = copy_warnings(graph, draws)
    assert line.startswith("domains.sort: 1 of 2 held_out examples have a copy among the examples to train on")
    assert list(copy_warnings(graph, {**draws, ("sort", HELD_OUT): clean})) == []
