"""Mistakes in a run file, through the command line: one message that names the key, exit code 2, no training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_pipeline import PATIENCE_SECONDS, RUN, Bench
from tests.numerics.conftest import tiny_policy

MISTAKE = 2
PAIR = {"sort2": {"domain": "sort", "train": {"sft": {"max_steps": 2}}}}
SPARE = {"kind": "strings", "options": {"task": "uppercase"}}


def override(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"


def rows(tmp: Path, text: str, **options: str) -> str:
    """An override that adds a `hub` domain over a local file."""
    (tmp / "rows.jsonl").write_text(text)
    own = {"path": str(tmp / "rows.jsonl"), "prompt_field": "q", "answer_field": "a", **options}
    return override("domains.rows", {"kind": "hub", "options": own})


class Desk(Bench):
    """A bench that also plans, offline."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment["HF_HUB_OFFLINE"] = "1"

    def plan(self, *overrides: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        flags = ["--check"] if check else []
        command = [sys.executable, "-m", "flows.cli", "plan", "--home", str(self.home), *flags, str(self.file)]
        return subprocess.run(
            [*command, *overrides],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def refuses(self, *overrides: str, check: bool = False) -> str:
        """The message of a plan that ends with exit code 2 and no traceback."""
        done = self.plan(*overrides, check=check)
        assert done.returncode == MISTAKE, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A run file of which nothing is made yet."""
    return Desk(tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "experts.sort.train.rl.group_sise=3",
            "experts.sort.train.rl.group_sise: unknown key — did you mean 'group_size'",
        ),
        ("mergee={}", "mergee: unknown key — did you mean 'merge'"),
        ("nonsense", "override 'nonsense': write KEY=VALUE"),
        ("name.x=1", "'name' is not a mapping"),
        ("domains.sort.options.task=srot", "domains.sort.options.task: Input should be 'sort'"),
        ("base={checkpoint: ./nowhere}", "base.checkpoint: ./nowhere: no such directory"),
        ("base={checkpoint: .}", "base.checkpoint: .: not a Hugging Face checkpoint"),
        ("base={checkpoint: some/model}", "base.checkpoint: 'some/model' is not a local directory"),
        ("base={gguf: nowhere.gguf}", "base.gguf: nowhere.gguf: no such file"),
        ("base={gguf: 'package://no_such/x.gguf'}", "base.gguf: package 'no_such' is not installed"),
        ("base={gguf: 'package://no.such/x.gguf'}", "base.gguf: package 'no.such' is not installed"),
        ("experts.sort={domain: sort, checkpoint: ./nowhere}", "experts.sort.checkpoint: ./nowhere: no such directory"),
        ("experts.sort={domain: sort, checkpoint: some/model}", "experts.sort.checkpoint: 'some/model' is not"),
        (
            override("domains.rows", {"kind": "hub", "options": {"path": "no.jsonl"}}),
            "domains.rows.options.answer_field",
        ),
    ],
)
def test_a_mistake_is_named_by_its_key(desk: Desk, wrong: str, message: str) -> None:
    assert message in desk.refuses(wrong)


def test_all_unknown_names_come_in_one_message(desk: Desk) -> None:
    message = desk.refuses("experts.sort.domain=srt", "domains.sort.kind=stings", "merge.teachers.reverse=revrse")
    for text in ("kind 'stings' — did you mean 'strings'", "domain 'srt' — did you mean 'sort'", "mean 'reverse'"):
        assert text in message
    message = desk.refuses("domains.sort.options.tsk=1", "domains.reverse.options.tusk=1")
    assert "domains.sort.options.tsk: unknown key — did you mean 'task'" in message
    assert "domains.reverse.options.tusk: unknown key — did you mean 'task'" in message


def test_a_broken_gguf_file_is_found_by_the_plan(desk: Desk, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_text("no weights")
    assert f"base.gguf: {broken}: not a GGUF file" in desk.refuses(override("base", {"gguf": str(broken)}))


def test_every_domain_needs_exactly_one_teacher(desk: Desk) -> None:
    lonely = desk.refuses(override("domains.spare", SPARE), override("merge.domains", ["sort", "spare"]))
    assert "domain 'spare' has no teacher; route it in merge.teachers" in lonely
    pair = {"one": RUN["experts"]["sort"], **PAIR}
    crowded = desk.refuses(override("experts", pair))
    assert "merge.teachers: domain 'sort' has 2 experts (one, sort2); name one" in crowded


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "rows.jsonl"),
        (
            '{"q": "1", "a": "2"}\n{"q": "3", "a": "4"}\n',
            {},
            "evaluate.shift.examples 8: domains.rows: no held_out examples; train has 2",
        ),
        ('{"q": "1", "a": "2"}\n', {"answer_field": "anser"}, "anser"),
    ],
)
def test_data_that_does_not_suffice_is_found_before_training(
    desk: Desk, tmp_path: Path, text: str, options: dict[str, str], message: str
) -> None:
    found = desk.refuses(rows(tmp_path, text, **options), check=True)
    assert "domains.rows" in found
    assert message in found


def test_sampling_that_cannot_work_is_found_before_training(desk: Desk) -> None:
    message = desk.refuses("experts.sort.train.rl.max_new_tokens=500", "merge.prompts_per_step=1", check=True)
    assert "experts/sort@0: max_new_tokens 500 leaves no room for a prompt in a context of 128 tokens" in message
    assert "student@0: prompts_per_step 1 leaves no prompt for domain 'general' of 3" in message


def test_a_teacher_with_another_tokenizer_is_found_before_training(desk: Desk, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    tiny_policy(0).save(foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = desk.refuses(override("experts.sort", {"domain": "sort", "checkpoint": str(foreign)}), check=True)
    assert "merge.teachers.sort: the tokenizer of teacher experts/sort differs from that of the student's" in message


def test_a_dead_prefect_server_is_one_message(desk: Desk) -> None:
    # Port 9 is discard's: nothing listens there.
    desk.environment["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    done = desk.run()
    del desk.environment["PREFECT_API_URL"]
    assert done.returncode == MISTAKE
    assert "error: PREFECT_API_URL: http://127.0.0.1:9/api does not answer" in done.stderr
    assert "Traceback" not in done.stderr
