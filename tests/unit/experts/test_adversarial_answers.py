"""Each adversarial answer gets its right mark: the scores are the rewards, so a wrong one is learned."""

import json
import re
import time
from pathlib import Path

import pytest

from base.errors import UserError
from experts.code.functions import Function
from experts.domain import TRAIN, Domain, Example
from experts.kinds.judge import chat, read_mark
from experts.kinds.strings import TASKS
from experts.loading import load_domain
from tests.unit.experts.adversarial_answers import ANIMALS, CORRUPTED, IMITATIONS, REPLIES, ROWS, Row

pytestmark = pytest.mark.slow

CASES = [(row, completion) for row in ROWS for completion in row.completions]
# What is not bounded takes minutes; a busy machine may take some of these.
SLACK_SECONDS = 60
HUB = ("exact", "numeric", "multiple_choice")
NUMBER = {"source_dataset": "", "source_index": 0}
# What the verifiers of reasoning-gym read beside the answer.
FACTS = {
    "complex_arithmetic": {"result": [13.0, 8.0]},
    "time_intervals": {"task_type": "date"},
    "word_sorting": {"sorted_words": ["a", "b", "c"]},
    "advanced_geometry": {
        "task_type": "orthocenter",
        "ortho": ["2.348", "3.553"],
        "orthocenter_approx": [2.348, 3.553],
    },
    "puzzle24": {"numbers": [6, 8, 2, 4]},
}


def hub(folder: Path, row: Row) -> tuple[Domain, Example]:
    """A domain of one row of data, and its example."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"q": row.question, "a": row.gold, "c": list(ANIMALS)}) + "\n")
    named = {"path": str(path), "prompt_field": "q", "answer_field": "a", "scorer": row.scorer, "held_out_share": 1e-9}
    options = {"choices_field": "c"} if row.scorer == "multiple_choice" else {}
    domain = load_domain("web", "hub", named | options | row.options)
    return domain, domain.draw(TRAIN, 1, seed=0)[0]


def scored(folder: Path, row: Row) -> tuple[Domain, Example]:
    """The domain and the example that a row's completions answer."""
    if row.scorer in HUB:
        return hub(folder, row)
    if row.scorer == "code_edit":
        domain = load_domain("code", "code_edit", {"timeout_seconds": 0.5})
        function = Function("id", "f", row.gold, [[1, 2], [5, 3]], [5, 11])
        return domain, domain._example(function, CORRUPTED, ["operator"])
    if row.scorer in TASKS:
        return load_domain("text", "strings", {"task": row.scorer}), Example("", row.gold, "text", "")
    facts = {"task": row.scorer, "answer": row.gold, "metadata": NUMBER | FACTS.get(row.scorer, {})}
    return load_domain("logic", "reasoning", {"tasks": {row.scorer: {}}}), Example("", row.gold, "logic", "", facts)


def test_there_are_as_many_as_the_suite_claims():
    assert len(CASES) + len(REPLIES) + len(IMITATIONS) >= 600
    assert {row.mark for row in ROWS} == {0, 1}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.scorer}-{str(row.gold)[:20]}-{row.mark}-{row.why}")
def test_each_answer_gets_its_right_mark(row, tmp_path):
    domain, example = scored(tmp_path, row)
    assert {text: domain.score(example, text) for text in row.completions} == dict.fromkeys(row.completions, row.mark)


@pytest.mark.parametrize("reply", REPLIES)
def test_a_mark_is_read_in_a_reply_of_nothing_else(reply):
    assert read_mark(reply, 10) == REPLIES[reply]


@pytest.mark.parametrize("imitation", IMITATIONS)
def test_a_completion_that_imitates_the_judge_stays_between_its_tags(imitation):
    example = Example("Say hello", "Hello", "manners", "")
    completion = imitation.replace("{tag}", "0123")
    user = chat("Politeness.", 10, example, completion, tag="abcd")[1]["content"]
    before, _, rest = user.partition("<completion-abcd>\n")
    inside, _, behind = rest.partition("\n</completion-abcd>")
    assert inside == completion
    assert "10" not in before and behind.count("10") == 1 and behind.endswith("one integer from 0 to 10.")


@pytest.mark.parametrize(
    "piece", [" ", "\n", "1 ", "1\n", "no, ", "A wait ", "A is correct ", "not 1 ", "</s>", "\\boxed{1}", "1,1 "]
)
@pytest.mark.parametrize("scorer", HUB)
def test_a_text_without_end_is_read_in_seconds(scorer, piece, tmp_path):
    gold = "B" if scorer == "multiple_choice" else "72"
    domain, example = hub(tmp_path, Row(scorer, gold, 0, "", ()))
    started = time.monotonic()
    assert domain.score(example, piece * (100_000 // len(piece))) == 0.0
    assert time.monotonic() - started < SLACK_SECONDS


@pytest.mark.parametrize("gold", ["", " ", "\u200b", "\u00a0\n", "<think>Paris</think>", ["Paris", ""]])
def test_a_gold_answer_without_text_is_refused_by_its_row(gold, tmp_path):
    with pytest.raises(UserError, match=r"domains\.web: row 1 \(line 1\) of .*rows\.jsonl'?: 'a' is empty"):
        hub(tmp_path, Row("exact", gold, 0, "", ()))


@pytest.mark.parametrize("gold", ["12:30", "12:30 PM", "3 or 4", "5 apples or 6"])
def test_a_gold_answer_of_which_only_a_part_is_read_is_refused(gold, tmp_path):
    with pytest.raises(UserError, match="no number or formula in the answer"):
        hub(tmp_path, Row("numeric", gold, 0, "", ()))


def test_no_pattern_repeats_a_group_possessively():
    """Python before 3.11.5, as in Debian 12, keeps what such a repetition consumed before it failed (gh-106052)."""
    sources = (Path(__file__).parents[3] / "experts").rglob("*.py")
    lines = [(path.name, line) for path in sources for line in path.read_text().splitlines()]
    assert [pair for pair in lines if re.search(r"\)(?:[?*+]|\{[\d,]+\})\+", pair[1])] == []
