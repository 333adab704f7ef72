"""What data becomes as tokens, before any training: named with the domain, an example, and counts."""

import json
from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from flows.check.check import deep_check
from flows.plan.graph import build_graph
from tests.support.chats import CHATML, GEMMA, make_policy
from tests.unit.flows.run_file.test_config import load

KIND = """
from experts.domain import Domain, Example, Options as Base

class Options(Base):
    prompt: str | list[dict[str, str]] = "how many?"
    answers: list[str] = ["3"]
    long: int = 0

class Own(Domain):
    def __init__(self, name, options):
        super().__init__(name)
        self.options = options

    def draw(self, split, count, seed):
        found = []
        for i in range(count):
            text = self.options.prompt
            if isinstance(text, str):
                text = f"{split} {i} {text}" + " word" * (400 if i < self.options.long else 0)
            else:
                text = [*text[:-1], {**text[-1], "content": f"{split} {i} {text[-1]['content']}"}]
            found.append(Example(text, self.options.answers[i % len(self.options.answers)], self.name, f"{split} {i}"))
        return found

    def score(self, example, completion):
        return float(completion.strip().lower() == example.answer.strip().lower())

    def fingerprint(self):
        return "own"

def load(name, options):
    return Own(name, options)
"""
METHODS = {
    "sft": {"sft": {"examples": 8, "max_steps": 1}},
    "rl": {"rl": {"examples": 8, "max_steps": 1, "prompts_per_step": 2, "max_new_tokens": 8}},
}


def checked(
    tmp_path: Path, base: dict, method: str = "sft", overrides: tuple[str, ...] = (), **options: object
) -> tuple[list[str], list[str]]:
    """Problems and warnings of a run with one domain of one's own and one expert."""
    kind = tmp_path / "own.py"
    kind.write_text(KIND)
    changes = {
        "base": base,
        "cold_start": None,
        "domains": {"own": {"kind": str(kind), "options": options}},
        "experts": {"own": {"domain": "own", "train": METHODS[method]}},
        "merge": None,
        "evaluate": {"examples": 4, "shift": None, "max_new_tokens": 8},
    }
    graph = build_graph(load(tmp_path, list(overrides), **changes), tmp_path / "home")
    try:
        return [], deep_check(graph, Store(tmp_path / "home"))
    except UserError as error:
        return str(error).splitlines(), []


CHARACTERS = {"pretrain": {"max_steps": 1, "examples": 8, "model": {"max_length": 256}}}


def imported(tmp_path: Path, family: str, template: str | None = None, **shape: object) -> dict:
    """A base of the family, as a directory."""
    folder = tmp_path / family
    policy = make_policy(family)
    if template is not None:
        policy.tokenizer.chat_template = template
    policy.save(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | shape))
    return {"checkpoint": str(folder)}


def test_data_that_fits_passes(tmp_path: Path) -> None:
    for base in (CHARACTERS, imported(tmp_path, "llama3")):
        for method in METHODS:
            assert checked(tmp_path, base, method) == ([], [])


@pytest.mark.parametrize("method", METHODS)
def test_answers_that_the_tokenizer_cannot_write_are_named(tmp_path: Path, method: str) -> None:
    problems, _ = checked(tmp_path, CHARACTERS, method, answers=["café"])
    assert problems == [
        "domains.own: 8 of 8 gold answers are changed by the model's tokenizer, so they would not get the full score, "
        "for example 'café', read back as 'caf'"
    ]
    problems, warnings = checked(tmp_path, CHARACTERS, method, answers=["café", "tea"])
    assert problems == []
    assert [warning for warning in warnings if warning.startswith("domains.own: 4 of 8 gold answers are changed")]


def test_answers_that_a_tokenizer_normalises_are_named_unless_they_score(tmp_path: Path) -> None:
    base = imported(tmp_path, "qwen3")
    file = Path(base["checkpoint"]) / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    file.write_text(json.dumps(tokenizer | {"normalizer": {"type": "NFC"}}))
    problems, _ = checked(tmp_path, base, "rl", answers=["cafe\u0301"])
    assert problems[0].startswith("domains.own: 8 of 8 gold answers are changed by the model's tokenizer")
    file.write_text(json.dumps(tokenizer | {"normalizer": {"type": "Lowercase"}}))
    assert checked(tmp_path, base, "rl", answers=["Tea"]) == ([], [])


def test_prompts_that_do_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    for base in (CHARACTERS, imported(tmp_path, "gpt2")):
        for method in METHODS:
            problems, _ = checked(tmp_path, base, method, long=2)
            assert problems
            assert all("domains.own: 2 of " in line and "longest" in line for line in problems), problems
    drop = ("experts.own.train.rl.longer_prompts=drop",)
    problems, _ = checked(tmp_path, imported(tmp_path, "gpt2"), "rl", drop, long=2)
    # Scores are taken on all held-out prompts.
    assert [line.partition(":")[0] for line in problems] == ["evaluate"]


@pytest.mark.parametrize("method", METHODS)
def test_a_template_that_refuses_a_role_is_named_with_the_domain(tmp_path: Path, method: str) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how many?"}]
    problems, _ = checked(tmp_path, imported(tmp_path, "gemma", GEMMA), method, prompt=prompt)
    assert problems
    for line in problems:
        assert line.startswith("domains.own: the chat template of ")
        assert line.endswith("refuses messages of the roles system, user: System role not supported")


def test_a_template_that_contradicts_itself_is_refused_where_answers_are_learned(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + CHATML
    base = imported(tmp_path, "chatml_base", template)
    problems, _ = checked(tmp_path, base, "sft")
    assert len(problems) == 1
    assert problems[0].startswith("domains.own: the chat template of ")
    assert "renders an answered prompt differently from the prompt" in problems[0]
    assert checked(tmp_path, base, "rl") == ([], [])


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    problems, _ = checked(tmp_path, imported(tmp_path, "llama3", vocab_size=300))
    assert len(problems) == 1
    assert "base: its tokenizer has" in problems[0]
    assert "beyond the 300 rows of the model's embedding" in problems[0]


def test_gold_answers_longer_than_completions_are_counted(tmp_path: Path) -> None:
    problems, warnings = checked(tmp_path, CHARACTERS, "rl", answers=["123456789", "3"])
    assert problems == []
    text = "domains.own: 4 of 8 gold answers are longer than max_new_tokens 8 (the longest has 10 tokens)"
    assert f"experts.own.train.rl: {text}" in warnings
    assert any(warning.startswith("evaluate: domains.own: 2 of 4") for warning in warnings)


def test_a_group_of_one_is_refused_by_the_schema(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts\.own\.train\.rl\.group_size: .*greater than or equal to 2"):
        checked(tmp_path, CHARACTERS, "rl", ("experts.own.train.rl.group_size=1",))
