"""Domains of one's own, rows and settings that do not go together: refused by the plan's check, named."""

import json
from typing import Any, NamedTuple

import pytest

from tests.support.desk import RL, RUN, Desk, Value

OWN = """
from experts.domain import Domain, Example, Options
from base.hashing import stable_hash
{imports}

class Mine(Domain):
    def __init__(self, name, options):
        super().__init__(name)

    def draw(self, split, count, seed):
        {draw}

    def score(self, example, completion):
        {score}

    def fingerprint(self):
        {fingerprint}


def load(name, options):
    {load}
"""
DRAWS = "return [Example(f'{split} {n}', str(n), self.name, f'{split} {n}') for n in range(count)]"  # fmt: skip


def own(**parts: str) -> str:
    """A domain of one's own, with parts of it replaced."""
    whole = {"imports": "", "draw": DRAWS, "score": "return float(completion == example.answer)"}
    whole |= {"fingerprint": "return 'one'", "load": "return Mine(name, options)"}
    return OWN.format(**whole | parts)


OWN_FILES = {
    "no Python": ("def load(:", ("SyntaxError",)),
    "empty": ("", ("this one has no Options and no load",)),
    "no options of a kind": ("Options = 3\ndef load(name, options): pass", ("Options is not a pydantic model",)),
    "load gives nothing": (own(load="return None"), ("load returned None; it must return a Domain",)),
    "load raises": (own(load="raise KeyError('x')"), ("load: KeyError: 'x'",)),
    "import ends the process": (own(imports="exit(0)"), ("import: SystemExit: 0",)),
    "load ends the process": (own(load="exit(0)"), ("load: SystemExit: 0",)),
    "load has no end": (own(load="return load(name, options)"), ("load: RecursionError",)),
    "fingerprint raises": (own(fingerprint="return 1 / 0"), ("fingerprint: ZeroDivisionError",)),
    "fingerprint is no text": (own(fingerprint="return None"), ("fingerprint gives no text but None",)),
    "fingerprint ends the process": (own(fingerprint="exit(0)"), ("fingerprint: SystemExit: 0",)),
    "draw gives nothing": (own(draw="return []"), ("draw gives 0 examples",)),
    "draw gives one prompt": (
        own(draw="return [Example('a', 'b', self.name, 'a')] * count"),
        ("has the prompt of an earlier one",),
    ),
    "draw gives text": (own(draw="return ['a'] * count"), ("is no Example but str",)),
    "draw gives no prompt": (own(draw="return [Example(' ', 'b', self.name, 'a')] * count"), ("prompt is empty",)),
    "draw gives a megabyte": (
        own(draw="return [Example('a' * 2**20, 'b', self.name, 'a')] * count"),
        ("has 1,048,576 characters",),
    ),
    "draw ends the process": (own(draw="exit(0)"), ("draw: SystemExit: 0",)),
    "score is no number": (own(score="return 'right'"), ("score gives right (str)",)),
    "the gold answer is no text": (
        own(draw="return [Example(f'{n} {split}', 7, self.name, f'{n} {split}') for n in range(count)]"),
        ("answer is no text but 7",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OWN_FILES)
def test_a_domain_of_ones_own_that_does_not_work_is_refused(desk: Desk, case: str) -> None:
    text, names = OWN_FILES[case]
    (desk.folder / "mine.py").write_text(text)
    desk.write(RUN | {"domains": RUN["domains"] | {"general": {"kind": "mine.py"}}})
    desk.refuses("plan", "--check", names=("general", "mine.py", *names))


FIELDS = {"prompt_field": "q", "answer_field": "a"}
GOOD = [{"q": f"{n} and {n}", "a": str(2 * n)} for n in range(40)]


class Rows(NamedTuple):
    """Rows of a `hub` domain, its options, and what its message names."""

    rows: list[Any] | str
    names: tuple[str, ...]
    options: dict[str, Any] = FIELDS


def with_row(row: object) -> list[Any]:
    return [*GOOD, row]


def template(text: str, *names: str) -> Rows:
    return Rows(
        GOOD, ("domains.general.options.prompt_template", *names), {"prompt_template": text, "answer_field": "a"}
    )


CHAT: dict[str, Any] = {"prompt_field": "q", "answer_field": "a"}
HUB = {
    "no rows": Rows("", ("rows.jsonl",)),
    "no JSON": Rows("{", ("row 1 (line 1)", "is not valid JSON")),
    "deep": Rows('{"q": ' * 100_000, ("nested too deeply",)),
    "no objects": Rows("7\n8\n", ("is not a JSON object",)),
    "a field twice": Rows('{"q": "1", "q": "2", "a": "3"}\n', ("field 'q' occurs twice",)),
    "no such field": Rows(GOOD, ("did you mean 'a'",), {"prompt_field": "q", "answer_field": "aa"}),
    "no prompt": Rows(with_row({"q": "", "a": "x"}), ("row 41", "'q' is empty")),
    "no answer": Rows(with_row({"q": "x", "a": " "}), ("row 41", "'a' is empty")),
    "a null answer": Rows(with_row({"q": "x", "a": None}), ("row 41", "'a' is missing or null")),
    "no right answer": Rows(with_row({"q": "x", "a": []}), ("row 41", "'a' is an empty list")),
    "an object": Rows(with_row({"q": "x", "a": {"b": 1}}), ("row 41", "'a' is an object")),
    "a megabyte": Rows(with_row({"q": "x" * 2**20, "a": "x"}), ("row 41", "1,048,576 characters")),
    "half a character": Rows('{"q": "\\ud800", "a": "1"}\n', ("half of a surrogate pair",)),
    "another role": Rows(with_row({"q": [{"role": "usr", "content": "x"}], "a": "y"}), ("did you mean 'user'",), CHAT),
    "a tool's call": Rows(
        with_row({"q": [{"role": "user", "content": "x", "tool_calls": [1]}], "a": "y"}), ("'tool_calls'",), CHAT
    ),
    "an answered prompt": Rows(
        with_row({"q": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}], "a": "y"}),
        ("ends with its answer",),
        CHAT,
    ),
    "no number": Rows([*GOOD[:3], {"q": "x", "a": "many"}], ("no number or formula",), FIELDS | {"scorer": "numeric"}),
    "too few": Rows(GOOD[:1], ("domains.general", "no held_out examples")),
    "a conversion": template("{q!z}", "only plain field names in braces"),
    "a width": template("{q:>1000000000}", "only plain field names in braces"),
    "an attribute": template("{q.__class__.__mro__[1]}", "only plain field names in braces"),
    "an open brace": template("{q", "expected '}'"),
    "no field": template("always the same", "names no field in braces"),
    "no expression": Rows(GOOD, ("not a regular expression",), FIELDS | {"answer_pattern": "("}),
    "two groups": Rows(GOOD, ("2 groups",), FIELDS | {"answer_pattern": "(a)(b)"}),
    "a share": Rows(GOOD, ("held_out_share",), FIELDS | {"held_out_share": 1.5}),
    "a folder without rows": Rows(GOOD, ("holds no file that ends in",), FIELDS | {"path": "empty"}),
    "a device": Rows(GOOD, ("is neither a file nor a folder",), FIELDS | {"path": "/dev/zero"}),
    "another ending": Rows(GOOD, ("is not a file of rows",), FIELDS | {"path": "run.yaml"}),
    "nothing": Rows(GOOD, ("no such file",), FIELDS | {"path": "nowhere.jsonl"}),
}


@pytest.mark.parametrize("case", HUB)
def test_rows_that_cannot_be_used_are_refused(desk: Desk, case: str) -> None:
    entry = HUB[case]
    text = entry.rows if isinstance(entry.rows, str) else "".join(json.dumps(row) + "\n" for row in entry.rows)
    (desk.folder / "rows.jsonl").write_text(text)
    (desk.folder / "empty").mkdir()
    domain = {"kind": "hub", "options": {"path": "rows.jsonl", **entry.options}}
    desk.write(RUN | {"domains": RUN["domains"] | {"general": domain}})
    desk.refuses("plan", "--check", names=("domains.general", *entry.names))


CHECKED = {
    "completions as long as the context": Value(
        f"{RL}.max_new_tokens=512", ("experts/sort@0: max_new_tokens 512 leaves no room for a prompt",)
    ),
    "fewer prompts than domains": Value(
        "merge.prompts_per_step=1", ("student@0: prompts_per_step 1 leaves no prompt",)
    ),
    "a context shorter than the data": Value("base.pretrain.model.max_length=8", ("domains.", "tokens")),
    "prompts longer than they may be": Value(f"{RL}.max_prompt_tokens=3", ("domains.sort", "more than 3 tokens")),
    "more devices than there are": Value("resources.gpus=4000", ("resources.gpus",)),
    "weights sharded over one device": Value("merge.sharding=fsdp", ("merge.sharding: fsdp shards over 2",)),
    "a task that is none": Value(
        "domains.general={kind: reasoning, options: {tasks: {no_such: {}}}}", ("reasoning-gym has no task 'no_such'",)
    ),
    "a parameter that is none": Value(
        "domains.general={kind: reasoning, options: {tasks: {chain_sum: {terms: 1}}}}", ("terms: unknown parameter",)
    ),
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_planning_alone_does_not_see_is_found_by_the_check(desk: Desk, case: str) -> None:
    desk.write(RUN)
    desk.refuses("plan", "--check", CHECKED[case].override, names=CHECKED[case].names)
