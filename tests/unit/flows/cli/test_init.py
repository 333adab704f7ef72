"""`mopd init`: a base and a few domains become a run file that the check passes."""

import json
from pathlib import Path

import pytest
import yaml

from flows.cli import init as cli_init
from flows.run_file.load import load_run_file
from tests.numerics.conftest import tiny_policy
from tests.unit.flows.cli.test_cli import mopd

HASHED = [{"question": f"{n}+{n % 7}?", "answer": f"{n} and {n % 7}.\n#### {n + n % 7}"} for n in range(60)]
CODES = [{"prompt": f"code {n}?", "completion": f"{n:03d}"} for n in range(60)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Tell me {n}"}, {"role": "assistant", "content": f"{n} is long " * 8}]}
    for n in range(60)
]
QUIZ = [{"problem": f"{n} or {n + 1}?", "choices": [str(n), str(n + 1)], "label": n % 2} for n in range(60)]
PAIRS = [{"instruction": "Add.", "input": f"{n}, 1", "output": str(n + 1)} for n in range(60)]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Files in a working folder; the run file goes beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    named = {"hashed": HASHED, "codes": CODES, "chats": CHATS, "quiz": QUIZ, "pairs": PAIRS}
    for name, rows in named.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def options(data: Path, name: str) -> dict:
    return yaml.safe_load((data / "mine.yaml").read_text())["domains"][name]["options"]


def init(data: Path, *arguments: str, base: str = "tiny"):
    return mopd("init", data / "mine.yaml", "--base", base, "--gpus", "0", "--home", data / "home", *arguments)


def test_what_it_writes_for_a_tiny_model_passes_the_check(data):
    asked = [f"--domain={name}={name}.jsonl" for name in ("hashed", "codes", "chats", "quiz", "pairs")]
    done = init(data, *asked, "--domain=order=strings:sort")
    assert done.exit_code == 0, done.output
    assert "check passed" in done.output
    assert f"Now: mopd run {data / 'mine.yaml'}" in done.output
    # The path was typed in the data's folder and is read from the run file's.
    fields = {"prompt_field": "question", "answer_field": "answer"}
    assert options(data, "hashed") == {
        "path": "data/hashed.jsonl", **fields, "answer_pattern": "#### (.+)", "scorer": "numeric"
    }  # fmt: skip
    assert options(data, "codes")["scorer"] == "exact"
    assert options(data, "chats") == {"path": "data/chats.jsonl", "messages_field": "messages", "scorer": "exact"}
    assert options(data, "quiz")["scorer"] == "multiple_choice"
    assert options(data, "pairs")["prompt_template"] == "{instruction}\n{input}"
    config = load_run_file(data / "mine.yaml")
    methods = {name: expert.train.chosen[0] for name, expert in config.experts.items()}
    assert methods == {"hashed": "rl", "codes": "rl", "chats": "sft", "quiz": "rl", "pairs": "rl", "order": "rl"}
    assert config.experts["hashed"].train.rl.max_new_tokens >= len(HASHED[-1]["answer"]) + 1
    assert config.teachers()["general"] == {"cold_start": 1.0}


def test_what_it_writes_for_a_checkpoint_trains_adapters_and_passes_the_check(data):
    tiny_policy(0).save(data / "model")
    done = init(data, "--domain=order=strings:sort", base=str(data / "model"))
    assert done.exit_code == 0, done.output
    config = load_run_file(data / "mine.yaml")
    assert config.base.checkpoint == str(data / "model")
    assert config.experts["order"].train.rl.lora == config.merge.lora == config.cold_start.sft.lora
    assert config.merge.lora.rank == 32


def test_what_is_named_is_not_guessed(data):
    done = init(data, "--domain=codes=codes.jsonl", "--option=codes.answer_field=prompt", "--option=codes.few_shot=1")
    assert done.exit_code == 0, done.output
    assert (options(data, "codes")["answer_field"], options(data, "codes")["few_shot"]) == ("prompt", 1)


def test_every_path_that_was_typed_is_read_from_the_run_file(data):
    (data / "data" / "apart.jsonl").write_text(f"{json.dumps({'prompt': 'code 99?', 'completion': '099'})}\n")
    done = init(data, "--domain=codes=codes.jsonl", "--option=codes.held_out_path=apart.jsonl")
    assert done.exit_code == 0, done.output
    assert options(data, "codes")["held_out_path"] == "data/apart.jsonl"


def test_it_asks_for_what_is_missing(data, monkeypatch):
    monkeypatch.setattr(cli_init, "_is_terminal", lambda: True)
    answers = iter(["tiny", "order=strings:sort", "back=strings:reverse", ""])
    monkeypatch.setattr("typer.prompt", lambda text, **_: next(answers))
    done = mopd("init", data / "mine.yaml", "--gpus", "0", "--home", data / "home")
    assert done.exit_code == 0, done.output
    assert list(load_run_file(data / "mine.yaml").experts) == ["order", "back"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain=codes"], "--domain 'codes': write NAME=DATA"),
        (["--domain=c=nothing.jsonl"], "no such file 'nothing.jsonl'"),
        (["--domain=c=codes.json"], "did you mean"),
        (["--domain=c=sort"], "'sort' is neither a file nor a Hub id (owner/name) nor a kind"),
        (["--domain=c=strings:srt"], "did you mean 'sort'"),
        (["--domain=c=reasoning:spell_backwards"], "did you mean 'spell_backward'"),
        (["--domain=c=codes.jsonl", "--domain=c=quiz.jsonl"], "'c' is named twice"),
        (["--domain=c=codes.jsonl", "--option=d.scorer=exact"], "no --domain 'd'"),
        (["--domain=c=codes.jsonl", "--option=scorer=exact"], "write NAME.KEY=VALUE"),
        (["--domain=c=codes.jsonl", "--option=c.scorer=exct"], "domains.c.options.scorer"),
        (["--domain=c=odd.jsonl"], "odd.jsonl: no field is called like question, prompt"),
        (["--domain=c=half.jsonl"], "name one by --option NAME.answer_field=FIELD, of x"),
        (["--domain=c=empty.jsonl"], "empty.jsonl"),
        (["--base=./nowhere", "--domain=c=strings:sort"], "--base: no such folder './nowhere'"),
        (["--base=none.gguf", "--domain=c=strings:sort"], "--base: no such file 'none.gguf'"),
        (["--domain=a/b=strings:sort"], "domains.'a/b': a name is made of letters"),
        (["--domain=c=long.jsonl"], "the largest tiny model reads 1024"),
        ([], "--base and at least one --domain are required"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(data, arguments, message):
    rows = {
        "odd": {"x": 1, "y": 2},
        "half": {"question": "1", "x": "2"},
        "long": {"question": "1" * 2000, "answer": "2"},
    }
    for name, row in rows.items():
        (data / "data" / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    (data / "data" / "empty.jsonl").write_text("")
    done = init(data, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert list(data.glob("*.yaml")) == list(data.glob(".*.new")) == []


def test_a_file_that_is_there_stays(data):
    (data / "mine.yaml").write_text("mine: 1\n")
    done = init(data, "--domain=order=strings:sort")
    assert (done.exit_code, (data / "mine.yaml").read_text()) == (2, "mine: 1\n")
    assert "exists already; choose another name, or --force replaces it" in done.stderr
    assert init(data, "--domain=order=strings:sort", "--force").exit_code == 0
