"""Data sets from files as domains, and the scorers of free text."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.loading import load_domain

FIELDS = {"prompt_field": "question", "answer_field": "answer"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count):
    return [{"question": f"{n}+1?", "answer": n + 1} for n in range(count)]


def hub(path, **options):
    return load_domain("web", "hub", {"path": path, **FIELDS, **options})


def test_a_file_is_split_by_prompt_and_drawn_repeatably(tmp_path):
    rows = sums(100)
    domain = hub(write(tmp_path / "sums.jsonl", [*rows, *rows]))
    train, held_out = domain.draw(TRAIN, 70, seed=0), domain.draw(HELD_OUT, 10, seed=0)
    assert train == domain.draw(TRAIN, 70, seed=0)
    assert train != domain.draw(TRAIN, 70, seed=1)
    assert {example.source for example in train}.isdisjoint(example.source for example in held_out)
    with pytest.raises(
        UserError, match=r"domains\.web: 1000 examples of split 'train' .* has (\d+) with distinct"
    ) as error:
        domain.draw(TRAIN, 1000, seed=0)
    available = int(str(error.value).split(" has ")[1].split()[0])
    assert len({example.prompt for example in domain.draw(TRAIN, available, seed=0)}) == available < 100


def test_a_prompt_in_both_splits_of_the_source_is_held_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", sums(30))
    write(folder / "test.jsonl", sums(10))
    domain = hub(str(folder), held_out_split="test")
    assert {example.prompt for example in domain.draw(HELD_OUT, 10, seed=0)} == {f"{n}+1?" for n in range(10)}
    assert {example.prompt for example in domain.draw(TRAIN, 20, seed=0)} == {f"{n}+1?" for n in range(10, 30)}
    before = domain.fingerprint()
    write(folder / "test.jsonl", sums(11))
    assert domain.fingerprint() != before
    with pytest.raises(UserError, match=r"options\.path: .*data' holds no file of split 'tests' — did you mean 'test'"):
        hub(str(folder), held_out_split="tests").draw(TRAIN, 1, seed=0)


def test_csv_and_templates_and_exact_scores(tmp_path):
    path = tmp_path / "capitals.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("land", "town"), ("France", "Paris"), ("Peru", "Lima")])
    domain = load_domain(
        "web",
        "hub",
        {"path": str(path), "prompt_template": "Capital of {land}?", "answer_field": "town", "held_out_share": 0.001},
    )
    examples = {example.prompt: example for example in domain.draw(TRAIN, 2, seed=0)}
    example = examples["Capital of Peru?"]
    assert domain.score(example, " Lima\n") == 1.0
    assert domain.score(example, "Paris") == 0.0


def test_chat_messages_are_kept_as_prompts(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    domain = hub(write(tmp_path / "chat.jsonl", [{"question": messages, "answer": "Hi"}]), held_out_share=0.001)
    assert domain.draw(TRAIN, 1, seed=0)[0].prompt == messages


def test_numeric_accepts_equal_values_only(tmp_path):
    domain = hub(write(tmp_path / "sums.jsonl", sums(50)), scorer="numeric")
    for example in domain.draw(TRAIN, 5, seed=0):
        value = int(example.answer)
        assert domain.score(example, f"The sum is ${value}$.") == 1.0
        assert domain.score(example, f"\\boxed{{\\frac{{{2 * value}}}{{2}}}}") == 1.0
        assert domain.score(example, f"It is {value + 1}") == 0.0
        assert domain.score(example, "no number") == 0.0


def test_numeric_scores_outside_the_main_thread(tmp_path):
    domain = hub(write(tmp_path / "sums.jsonl", sums(50)), scorer="numeric")
    example = domain.draw(TRAIN, 1, seed=0)[0]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(domain.score, example, f"{example.answer}.0").result() == 1.0


def test_multiple_choice_shows_letters_and_reads_them_back(tmp_path):
    rows = [
        {"question": "Largest?", "options": ["ant", "cow", "dog"], "answer": 1},
        {"question": "Smallest?", "options": ["ant", "cow", "dog"], "answer": 0},
    ]
    domain = hub(
        write(tmp_path / "mc.jsonl", rows), scorer="multiple_choice", choices_field="options", held_out_share=0.001
    )
    examples = {example.answer: example for example in domain.draw(TRAIN, 2, seed=0)}
    largest = examples["B"]
    assert largest.prompt == "Largest?\nA. ant\nB. cow\nC. dog"
    for right in ("B", "(b)", "B. cow", "cow", "It moos, so the answer is **B**.", "\\boxed{B}"):
        assert domain.score(largest, right) == 1.0
    for wrong in ("A", "", "dog", "Both", "the answer is A", "B or not, the answer: C"):
        assert domain.score(largest, wrong) == 0.0


def test_a_template_places_the_choices(tmp_path):
    rows = [{"question": "Q", "options": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "2"}]
    domain = load_domain(
        "web",
        "hub",
        {
            "path": write(tmp_path / "mc.jsonl", rows),
            "prompt_template": "{question}\n{options}\nAnswer:",
            "answer_field": "answer",
            "choices_field": "options",
            "scorer": "multiple_choice",
            "held_out_share": 0.001,
        },
    )
    example = domain.draw(TRAIN, 1, seed=0)[0]
    assert (example.prompt, example.answer) == ("Q\nA. x\nB. y\nAnswer:", "B")


def test_mistakes_about_the_file_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"domains\.web\.options\.path: no such file .*gone\.jsonl"):
        hub(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"domains\.web: .*none\.jsonl' is empty"):
        hub(write(tmp_path / "none.jsonl", [])).draw(TRAIN, 1, seed=0)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oops\n")
    with pytest.raises(
        UserError,
        match=r"domains\.web\.options\.path: row 1 \(line 1\) of .*broken\.jsonl' is not valid JSON: Expecting",
    ):
        hub(str(broken)).draw(TRAIN, 1, seed=0)


def test_mistakes_about_fields_are_explained(tmp_path):
    path = write(tmp_path / "sums.jsonl", sums(5))
    with pytest.raises(UserError, match=r"options\.answer_field: .* no field 'anwser' — did you mean 'answer'"):
        hub(path, answer_field="anwser").draw(TRAIN, 1, seed=0)
    with pytest.raises(UserError, match="give either prompt_field or prompt_template"):
        hub(path, prompt_template="{question}")
    with pytest.raises(UserError, match="multiple_choice and choices_field go together"):
        hub(path, scorer="multiple_choice")
    wordy = write(tmp_path / "words.jsonl", [{"question": "?", "answer": "many"}])
    with pytest.raises(
        UserError, match=r"row 1 \(line 1\) of .*words\.jsonl.*no number or formula in the answer 'many'"
    ):
        hub(wordy, scorer="numeric").draw(TRAIN, 1, seed=0)


def test_fingerprint_follows_content_and_revision_not_the_place(tmp_path):
    here, there = write(tmp_path / "a.jsonl", sums(5)), write(tmp_path / "b.jsonl", sums(5))
    assert hub(here).fingerprint() == hub(there).fingerprint()
    assert hub(here).fingerprint() != hub(here, scorer="numeric").fingerprint()
    before = hub(here).fingerprint()
    write(tmp_path / "a.jsonl", sums(6))
    assert hub(here).fingerprint() != before
    assert hub("owner/name", revision="a").fingerprint() != hub("owner/name", revision="b").fingerprint()
