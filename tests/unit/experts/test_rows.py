"""Rows of files keep their text; what cannot be used is refused with file, row and field."""

import csv
import datetime
import decimal
import gzip
import json
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from base.errors import UserError
from experts.domain import HELD_OUT, TRAIN
from experts.loading import load_domain
from tests.unit.experts.test_hub import FIELDS, hub, write

WRITTEN = ["2024-05-01", "2024-05-01T10:00:00Z", "007", "3.10", "1e5", "true", "null", "NaN", "1,234", "  x ", "½"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def answers_of(domain):
    """Answer by prompt, of both splits."""
    pools = domain._examples
    return {example.prompt: example.answer for split in (TRAIN, HELD_OUT) for example in pools[split]}


def raw(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def csv_file(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz", "JSONL"])
def test_text_stays_as_it_is_written_in_every_format(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    rows = [{"question": f"q{number}", "answer": text} for number, text in enumerate(WRITTEN)]
    if "csv" in ending or "tsv" in ending:
        table = [list(rows[0]), *[list(row.values()) for row in rows]]
        csv_file(path, table, "\t" if "tsv" in ending else ",")
    elif ending == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write(path, rows)
    if ending.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert answers_of(hub(str(path))) == {row["question"]: row["answer"] for row in rows}


def test_json_numbers_stay_as_they_are_written_beside_each_other(tmp_path):
    numbers = ["3", "2.5", "1180591620717411303424", "3.10", "1e5", "-0", "0.1000"]
    lines = "".join(f'{{"question": "q{n}", "answer": {text}}}\n' for n, text in enumerate(numbers))
    found = answers_of(hub(raw(tmp_path / "n.jsonl", lines)))
    assert list(dict(sorted(found.items())).values()) == numbers


def test_typed_columns_are_rendered_exactly(tmp_path):
    values = {
        "3": pyarrow.array([3], pyarrow.int64()),
        "1180591620717411303424": pyarrow.array([decimal.Decimal(2**70)], pyarrow.decimal128(38, 0)),
        "2.5": pyarrow.array([2.5]),
        "2024-05-01": pyarrow.array([datetime.date(2024, 5, 1)]),
        "true": pyarrow.array([True]),
        "007": pyarrow.array(["007"]),
    }
    for number, (text, column) in enumerate(values.items()):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": column}), path)
        assert answers_of(hub(str(path))) == {"q": text}


def test_bom_line_ends_and_empty_lines_are_no_text(tmp_path):
    lines = '\ufeff{"question": "a\\u2028b", "answer": "1\\r\\n2"}\r\n\r\n{"question": "c", "answer": "d"}\r\n'
    assert answers_of(hub(raw(tmp_path / "r.jsonl", lines))) == {"a\u2028b": "1\r\n2", "c": "d"}
    assert answers_of(hub(raw(tmp_path / "r.json", lines))) == {"a\u2028b": "1\r\n2", "c": "d"}
    table = '\ufeffquestion,answer\r\n"a, b","x\r\ny"\r\n\r\nc,"say ""d"""\r\n'
    assert answers_of(hub(raw(tmp_path / "r.csv", table))) == {"a, b": "x\r\ny", "c": 'say "d"'}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"question": "q", "answer": "a"}\n{"answer": "a"}', r"row 2 \(line 2\) .*'question' is missing"),
        ("r.jsonl", '{"question": "q", "answer": null}', r"row 1 \(line 1\) .*'answer' is missing or null"),
        ("r.jsonl", '\n{"question": "q", "answer": ""}', r"row 1 \(line 2\) .*'answer' is empty"),
        ("r.jsonl", '{"question": " ", "answer": "a"}', r"row 1 .*'question' is empty"),
        ("r.jsonl", '{"question": "q", "answer": {"v": "a"}}', r"'answer' is an object; name .*'v', with a dot"),
        ("r.jsonl", '{"question": "q", "answer": ["a", ""]}', r"'answer' is empty"),
        ("r.jsonl", '{"question": "q", "answer": ["a", null]}', r"'answer' is missing or null"),
        ("r.jsonl", '{"question": "q", "answer": [["a"]]}', r"'answer' is neither text nor a number: \['a'\]"),
        ("r.jsonl", '{"question": "q", "answer": "a", "answer": "b"}', r"row 1 .*field 'answer' occurs twice"),
        ("r.jsonl", '{"question": "q", "answer": "\\ud800"}', r"row 1 .*'answer' holds half of a surrogate pair"),
        ("r.jsonl", '["q", "a"]', r"row 1 .*is not a JSON object: \['q', 'a'\]"),
        ("r.jsonl", "[" * 100_000, r"row 1 .*nested too deeply"),
        ("r.jsonl", b'{"question": "\xff"}', r"not UTF-8 text: line 1"),
        ("r.json", '{"rows": [', r"r\.json' is not valid JSON"),
        ("r.csv", "question,answer\nq\n", r"row 1 \(line 2\) .*has 1 cells, the header has 2: question, answer"),
        ("r.csv", "question,answer\nq,a,b\n", r"row 1 \(line 2\) .*has 3 cells"),
        ("r.csv", 'question,answer\nq,"a', r"row 1 \(line 2\) .*is not valid CSV"),
        ("r.csv", "question,answer,answer\nq,a,b\n", r"field 'answer' occurs twice in the header"),
        ("r.csv", "question,answer\nq,\n", r"row 1 \(line 2\) .*'answer' is empty"),
        ("r.csv", "question;answer\nq;a\n", r"has no field 'question'.*its fields: question;answer"),
        ("r.jsonl.gz", "no gzip", r"r\.jsonl\.gz' cannot be read"),
        ("r.parquet", "no parquet", r"r\.parquet' cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_file_row_and_field(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        hub(raw(tmp_path / name, content)).draw(TRAIN, 1, seed=0)
    assert "domains.web" in str(error.value) and name in str(error.value)


def test_every_row_with_a_mistake_is_counted(tmp_path):
    rows = [{"question": f"q{n}", "answer": None} for n in range(9)]
    with pytest.raises(UserError, match=r"row 1 (.|\n)*row 3 (.|\n)*and 6 more rows") as error:
        hub(write(tmp_path / "r.jsonl", rows)).draw(TRAIN, 1, seed=0)
    assert "row 4" not in str(error.value)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_text_of_a_megabyte_is_refused(tmp_path, field):
    row = {"question": "q", "answer": "a"} | {field: "x" * 2**20}
    for path in (write(tmp_path / "r.jsonl", [row]), csv_file(tmp_path / "r.csv", [list(row), list(row.values())])):
        with pytest.raises(UserError, match=rf"row 1 .*'{field}' has 1,048,576 characters, the limit is 500,000"):
            hub(path).draw(TRAIN, 1, seed=0)


SEVERAL = {"q1": ["Paris", "City of Paris"], "q2": ["Lima"]}


@pytest.mark.parametrize("form", ["list", "SQuAD", "inside"])
def test_each_of_several_right_answers_scores(tmp_path, form):
    field = "answer.text" if form == "inside" else "answer"
    rows = [
        {"question": q, "answer": several if form == "list" else {"text": several, "answer_start": [1] * len(several)}}
        for q, several in SEVERAL.items()
    ]
    domain = hub(write(tmp_path / "r.jsonl", rows), answer_field=field, held_out_share=0.001)
    drawn = {example.prompt: example for example in domain.draw(TRAIN, 2, seed=0)}
    assert {prompt: example.answer for prompt, example in drawn.items()} == {"q1": "Paris", "q2": "Lima"}
    assert [domain.score(drawn["q1"], text) for text in ("Paris", "City of Paris ", "Lima", "")] == [1, 1, 0, 0]
    assert json.loads(json.dumps(drawn["q1"].meta)) == drawn["q1"].meta


def test_each_of_several_right_numbers_scores(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"question": "x²=4?", "answer": [2, "-2"]}])
    domain = hub(path, scorer="numeric", held_out_share=0.001)
    (example,) = domain.draw(TRAIN, 1, seed=0)
    assert [domain.score(example, text) for text in ("x is **2**", "-2", "4", "")] == [1, 1, 0, 0]


GSM8K = [
    {"question": "Eggs?", "answer": "16-3=<<16-3=13>>13 left.\n#### 13"},
    {"question": "Bolts?", "answer": "It takes 2/2=<<2/2=1>>1, so 2+1=<<2+1=3>>3\n#### 3"},
    {"question": "Profit?", "answer": "He made $70,000\n#### 70,000"},
]


@pytest.mark.parametrize("scorer", ["numeric", "exact"])
def test_gsm8k_trains_on_the_reasoning_and_scores_the_answer(tmp_path, scorer):
    path = write(tmp_path / "gsm.jsonl", GSM8K)
    domain = hub(path, answer_pattern=r"#### (.+)", scorer=scorer, held_out_share=0.001)
    drawn = {example.prompt: example for example in domain.draw(TRAIN, 3, seed=0)}
    for row in GSM8K:
        example = drawn[row["question"]]
        assert domain.demonstration(example, None) == row["answer"]
        assert domain.score(example, row["answer"]) == 1.0
        assert domain.score(example, "Wrong: 5\n#### 5") == 0.0
    assert domain.score(drawn["Bolts?"], "2+1=3, no: \n#### 4") == 0.0
    assert domain.score(drawn["Bolts?"], "#### 4\n#### 3") == 1.0
    assert domain.score(drawn["Bolts?"], "3") == 1.0
    assert domain.score(drawn["Profit?"], "#### 70000") == float(scorer == "numeric")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("#### .+", "has 0 groups in parentheses; exactly one must"),
        ("(#+) (.+)", "has 2 groups"),
        ("(", "is not a regular expression"),
    ],
)
def test_a_pattern_has_one_group(tmp_path, pattern, message):
    with pytest.raises(UserError, match=rf"options\.answer_pattern: .*{message}"):
        hub(write(tmp_path / "gsm.jsonl", GSM8K), answer_pattern=pattern)


def test_a_pattern_that_finds_nothing_names_the_row(tmp_path):
    path = write(tmp_path / "gsm.jsonl", [*GSM8K, {"question": "q", "answer": "13"}])
    with pytest.raises(UserError, match=r"row 4 .*'answer': answer_pattern '#### \(\.\+\)' finds nothing in '13'"):
        hub(path, answer_pattern="#### (.+)").draw(TRAIN, 1, seed=0)


def test_a_pattern_without_end_is_ended_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("experts.isolation.untrusted.SECONDS", 1.0)
    path = write(tmp_path / "r.jsonl", [{"question": "q", "answer": "aa!"}])
    domain = hub(path, answer_pattern=r"^((?:a+)+)!$", held_out_share=0.001)
    (example,) = domain.draw(TRAIN, 1, seed=0)
    assert domain.score(example, "a" * 60) == 0.0
    assert domain.facts() == {"verifier_lost": 1.0}


@pytest.mark.parametrize("other", ["e\u0301", "\u00e9"])
def test_exact_ignores_unicode_s_form_and_outer_space(tmp_path, other):
    path = write(tmp_path / "r.jsonl", [{"question": "Coffee?", "answer": "caf\u00e9"}])
    domain = hub(path, held_out_share=0.001)
    (example,) = domain.draw(TRAIN, 1, seed=0)
    assert domain.score(example, f"\n caf{other} ") == 1.0
    assert domain.score(example, "cafe") == domain.score(example, "Caf\u00e9") == 0.0


def test_train_and_held_out_rows_come_from_a_file_each(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"question": f"q{n}", "answer": n} for n in range(8)])
    test = csv_file(tmp_path / "test.csv", [["question", "answer"], *[[f"q{n}", n] for n in range(6, 10)]])
    domain = hub(train, held_out_path=test)
    assert {example.prompt for example in domain.draw(HELD_OUT, 4, seed=0)} == {"q6", "q7", "q8", "q9"}
    assert {example.prompt for example in domain.draw(TRAIN, 6, seed=0)} == {f"q{n}" for n in range(6)}
    told = "2 prompts to train on are held-out ones too, and are left out of training"
    assert domain.left_out == (f"domains.web: {told}",)
    before = domain.fingerprint()
    csv_file(tmp_path / "test.csv", [["question", "answer"], ["q9", "9"]])
    assert hub(train, held_out_path=test).fingerprint() != before
    with pytest.raises(
        UserError, match=r"options\.held_out_path: no such file .*tset\.csv' — did you mean .*test\.csv"
    ):
        hub(train, held_out_path=str(tmp_path / "tset.csv"))
    with pytest.raises(UserError, match="give either held_out_split or held_out_path"):
        hub(train, held_out_path=test, held_out_split="test")


def test_a_second_answer_of_a_prompt_is_counted(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in [("q", "a"), ("q", "b"), ("q", "a"), ("p", "c")]]
    domain = hub(write(tmp_path / "r.jsonl", rows))
    assert answers_of(domain) == {"q": "a", "p": "c"}
    (line,) = domain.left_out
    assert "2 rows of" in line and line.endswith("1 of them with another answer; the first one counts")


def template(path, text, **options):
    named = {"prompt_template": text, "answer_field": "answer", "held_out_share": 0.001}
    return load_domain("web", "hub", {"path": path} | named | options)


def test_a_template_shows_what_is_written(tmp_path):
    lines = '{"a": 3.10, "b": {"c": 7}, "d": "", "answer": 1}\n'
    domain = template(raw(tmp_path / "r.jsonl", lines), "{{{a}}} {b.c} {d}|")
    assert domain.draw(TRAIN, 1, seed=0)[0].prompt == "{3.10} 7 |"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{q!z}", "only plain field names in braces"),
        ("{q:>1000000000}", "only plain field names in braces"),
        ("{q[0]}", "only plain field names in braces"),
        ("{}", "only plain field names in braces"),
        ("{q", "expected '}'"),
        ("q}", "Single '}'"),
        ("no field", "names no field"),
        ("{q.__class__}", "row 1 .*'q.__class__' is missing"),
        ("{gone}", "prompt_template: .* no field 'gone'"),
        ("{nothing}", "row 1 .*'nothing' is missing or null"),
        ("{many}", "row 1 .*'many' is neither text nor a number"),
        ("{blank}", "row 1 .*'blank': all of these fields are empty"),
    ],
)
def test_a_template_holds_fields_that_are_text(tmp_path, text, message):
    row = {"q": "?", "nothing": None, "many": ["a", "b"], "blank": " ", "answer": "a"}
    with pytest.raises(UserError, match=message):
        template(write(tmp_path / "r.jsonl", [row]), text).draw(TRAIN, 1, seed=0)


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def chats(tmp_path, *rows, **options):
    path = write(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])
    named = {"messages_field": "messages", "held_out_share": 0.001}
    return load_domain("web", "hub", {"path": path} | named | options)


def test_a_chat_s_last_message_is_its_answer_and_all_turns_stay(tmp_path):
    row = [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello", "2+2?", "4")]
    domain = chats(tmp_path, row)
    (example,) = domain.draw(TRAIN, 1, seed=0)
    assert (example.prompt, example.answer) == (row[:-1], "4")
    assert example.messages == row
    assert (domain.score(example, "4"), domain.score(example, "5")) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (turns("Hi"), r"row 1 .*'messages' does not end with an assistant message"),
        ([{"role": "assistant", "content": "Hi"}], "does not end with an assistant message after a question"),
        (
            [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
            "message 2 has 'tool_calls'",
        ),
        ([*turns("Hi"), {"role": "tool", "content": "7"}, *turns("a", "b")], "message 2 has the role 'tool'"),
        (turns("Hi", " "), r"message 2 \(assistant\) has no text"),
        ([{"from": "human", "value": "Hi"}], "message 1 has no 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], r"message 1 \(user\) has no text"),
        ("Hi", "neither text nor a list of chat messages"),
        ([], "neither text nor a list of chat messages"),
    ],
)
def test_chats_that_cannot_be_used_are_refused_by_row_and_message(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        chats(tmp_path, row).draw(TRAIN, 1, seed=0)


def test_every_answer_of_a_chat_is_an_example_where_that_is_asked_for(tmp_path):
    row = [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello", "2+2?", "4", "Thanks")]
    domain = chats(tmp_path, row, assistant_turns="all")
    examples = domain.draw(TRAIN, 2, seed=0)
    assert sorted((len(e.prompt), e.answer) for e in examples) == [(2, "Hello"), (4, "4")]
    assert all(e.prompt == row[: len(e.prompt)] for e in examples)
    with pytest.raises(UserError, match="2 with distinct prompts"):
        domain.draw(TRAIN, 3, seed=0)
    default, asked = chats(tmp_path, row), chats(tmp_path, row, assistant_turns="last")
    assert default.fingerprint() == asked.fingerprint() != domain.fingerprint()


def test_the_answers_of_a_chat_are_trained_on_or_held_out_together(tmp_path):
    rows = [turns(f"Hi {n}", "Hello", f"{n}+1?", str(n + 1), "More?", "No") for n in range(40)]
    domain = chats(tmp_path, *rows, assistant_turns="all", held_out_share=0.3)
    opened = {
        split: [example.prompt[0]["content"] for example in domain.draw(split, domain.supply(split), seed=0)]
        for split in (TRAIN, HELD_OUT)
    }
    assert not set(opened[TRAIN]) & set(opened[HELD_OUT])
    assert len(opened[TRAIN]) + len(opened[HELD_OUT]) == 3 * len(rows)
    assert set(Counter(opened[TRAIN] + opened[HELD_OUT]).values()) == {3}
    # A file of its own for the held-out chats keeps their openings out of training, too.
    apart = write(tmp_path / "apart.jsonl", [{"messages": turns("Hi 7", "Hello", "And 8+1?", "9")}])
    beside = chats(tmp_path, *rows, assistant_turns="all", held_out_path=apart)
    assert "Hi 7" not in {e.prompt[0]["content"] for e in beside.draw(TRAIN, beside.supply(TRAIN), seed=0)}
    assert beside.supply(TRAIN) == 3 * (len(rows) - 1)


def test_answers_of_a_chat_need_a_chat(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"question": "1", "answer": "1"}])
    with pytest.raises(UserError, match="assistant_turns: 'all' goes with messages_field"):
        hub(path, assistant_turns="all")


def test_keys_of_messages_that_are_not_used_are_counted(tmp_path, caplog):
    row = turns("Hi", "Hello")
    row[0] |= {"id": 7, "tool_calls": None}
    assert len(chats(tmp_path, row).draw(TRAIN, 1, seed=0)) == 1
    assert "keys of messages that are not used, with their number: {'id': 1}" in caplog.text


def test_a_prompt_that_ends_with_its_answer_is_refused(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"question": turns("Hi", "Hello"), "answer": "Hello"}])
    with pytest.raises(
        UserError, match=r"row 1 .*'question' ends with its answer; name a whole chat by messages_field"
    ):
        hub(path).draw(TRAIN, 1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages_field": "m", "prompt_field": "q"}, "give either prompt_field or prompt_template"),
        ({"messages_field": "m", "answer_field": "a"}, "answer_field: .*the last assistant message is the answer"),
        ({"prompt_field": "q"}, r"answer_field: .*name the field with the gold answer"),
    ],
)
def test_a_prompt_and_an_answer_come_from_one_place_each(tmp_path, options, message):
    path = write(tmp_path / "r.jsonl", [{"q": "?", "a": "!", "m": turns("?", "!")}])
    with pytest.raises(UserError, match=message):
        load_domain("web", "hub", {"path": path, **options})


def qa(tmp_path, count=12, **options):
    rows = [{"question": f"{n}+1?", "answer": n + 1} for n in range(count)]
    return hub(write(tmp_path / "qa.jsonl", rows), held_out_share=0.5, **options)


def test_solved_examples_come_from_train_rows_that_are_left_out(tmp_path):
    plain, domain = qa(tmp_path), qa(tmp_path, few_shot=2)
    before = {split: {e.source for e in plain._examples[split]} for split in (TRAIN, HELD_OUT)}
    drawn = domain._examples
    shown = before[TRAIN] - {example.source for example in drawn[TRAIN]}
    assert len(shown) == 2 and {example.source for example in drawn[HELD_OUT]} == before[HELD_OUT]
    for example in [*drawn[TRAIN], *drawn[HELD_OUT]]:
        *shots, last = example.prompt.replace("\n\n", " ").split(" ")
        assert last == example.source and set(shots[::2]) == shown
        assert [int(answer) for answer in shots[1::2]] == [int(prompt.split("+")[0]) + 1 for prompt in shots[::2]]
    with pytest.raises(UserError, match=r"options\.few_shot: 60 examples leave none of the \d+ to train on"):
        qa(tmp_path, few_shot=60).draw(TRAIN, 1, seed=0)


def test_a_system_prompt_makes_a_chat_with_examples_as_turns(tmp_path):
    domain = qa(tmp_path, few_shot=1, system="Add.")
    example = domain.draw(HELD_OUT, 1, seed=0)[0]
    assert [message["role"] for message in example.prompt] == ["system", "user", "assistant", "user"]
    assert example.prompt[0]["content"] == "Add." and example.prompt[-1]["content"] == example.source
    assert qa(tmp_path, system="Add.").fingerprint() != qa(tmp_path).fingerprint()
    own = [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello")]
    with pytest.raises(
        UserError, match=r"row 1 .*has a system message of its own beside domains\.web\.options\.system"
    ):
        chats(tmp_path, own, system="Add.").draw(TRAIN, 1, seed=0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone.jsonl", "no such file"),
        ("data/sub/gone", "no such file"),
        ("./gone", "no such file"),
        ("rows.txt", "is not a file of rows; its name must end in .jsonl"),
    ],
)
def test_a_path_that_can_only_be_local_is_looked_for(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(UserError, match=rf"domains\.web\.options\.path: .*{message}"):
        hub(path)


def test_files_of_a_folder_belong_to_the_split_of_their_name(tmp_path):
    folder = tmp_path / "data"
    (folder / "main").mkdir(parents=True)
    write(folder / "main" / "train-00000-of-00001.jsonl", [{"question": "a", "answer": 1}])
    write(folder / "main" / "dev.jsonl", [{"question": "b", "answer": 2}])
    (folder / "README.md").write_text("not rows")
    domain = hub(str(folder), name="main", held_out_split="validation")
    assert [example.prompt for example in domain.draw(HELD_OUT, 1, seed=0)] == ["b"]
    assert [example.prompt for example in domain.draw(TRAIN, 1, seed=0)] == ["a"]
    with pytest.raises(UserError, match=r"options\.path: '.*data' has no folder 'side'"):
        hub(str(folder), name="side").draw(TRAIN, 1, seed=0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"'.*empty' holds no file that ends in \.jsonl"):
        hub(str(empty)).draw(TRAIN, 1, seed=0)


def test_local_rows_need_no_heavy_import(tmp_path):

    path = write(tmp_path / "r.jsonl", [{"question": "q", "answer": "a"}])
    code = (
        "import sys; from experts.loading import load_domain;"
        f"d = load_domain('web', 'hub', {{'path': {path!r}, **{FIELDS!r}}}); d.fingerprint(); d._examples;"
        "print(not {'datasets', 'math_verify', 'pyarrow', 'sympy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
