"""`mopd add-expert` and `remove-expert`: the run file keeps its comments, and only the new expert is to be trained."""

import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import UserError
from base.store.checkpoint import Store
from flows.plan.lock import status
from flows.run_file.load import load_run_file
from flows.scaffold.add_expert import NewExpert, add_expert, remove_expert
from tests.support.checkpoints import pretend_checkpoint
from tests.support.scored_home import finish, graph_of

TEXT = """\
# Two skills, kept small.
name: tiny
base:
  pretrain: {max_steps: 5}
domains:
  sort: {kind: strings, options: {task: sort}}
  reverse:
    kind: strings  # the other way round
    options: {task: reverse}
cold_start:
  sft: {max_steps: 5}
experts:
  sort:
    domain: sort
    train:
      rl: {max_steps: 5}
  reverse:
    domain: reverse
    train:
      sft: {max_steps: 7}
merge:
  max_steps: 5
evaluate:
  shift: null  # quick
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def waiting(file: Path, home: Path) -> set[str]:
    """Stages that are to run."""
    entries = status(graph_of(file, home), Store(home))
    return {entry.node.id for entry in entries if not entry.cached and entry.node.stage != "evaluate"}


def test_a_reasoning_domain_costs_one_command_and_its_expert(file: Path, home: Path) -> None:
    finish(
        graph_of(file, home),
        home,
        dict.fromkeys(["base", "cold_start", "experts/sort", "experts/reverse"], 0.5) | {"student": 0.5},
    )
    said = add_expert(file, NewExpert("countdown", "reasoning", tasks=["countdown"]), home)
    assert waiting(file, home) == {"experts/countdown@0", "student@0"}
    assert any(line.startswith("an example of countdown: ") for line in said)
    assert any(line.startswith("to run: experts/countdown@0, student@0, and ") for line in said)
    config = load_run_file(file)
    assert config.experts["countdown"].domain == "countdown"
    assert config.experts["countdown"].train.chosen[0] == "rl"
    assert config.experts["countdown"].train.chosen[1].max_steps == 5
    text = file.read_text()
    assert "# Two skills, kept small." in text and "# the other way round" in text and "# quick" in text


def test_removing_what_was_added_trains_nothing(file: Path, home: Path) -> None:
    shares = dict.fromkeys(["base", "cold_start", "experts/sort", "experts/reverse", "student"], 0.5)
    finish(graph_of(file, home), home, shares)
    add_expert(file, NewExpert("countdown", "reasoning", tasks=["countdown"]), home)
    remove_expert(file, "countdown", home, with_domain=True)
    assert waiting(file, home) == set()
    assert set(load_run_file(file).experts) == {"sort", "reverse"}


def test_an_expert_in_a_domain_that_is_there_copies_the_settings_it_is_told_to(file: Path, home: Path) -> None:
    add_expert(file, NewExpert("sort2", "sort", like="reverse", settings=["max_steps=9"]), home)
    method, settings = (
        load_run_file(file, ["merge.teachers={sort: sort2, reverse: reverse}"]).experts["sort2"].train.chosen
    )
    assert (method, settings.max_steps) == ("sft", 9)


def test_an_expert_trained_elsewhere_joins_by_its_checkpoint(file: Path, home: Path, tmp_path: Path) -> None:
    folder = pretend_checkpoint(tmp_path / "elsewhere")
    add_expert(file, NewExpert("upper", "strings", tasks=["uppercase"], checkpoint=str(folder)), home)
    assert load_run_file(file).experts["upper"].checkpoint == str(folder)
    assert {"experts/upper", "student@0"} <= waiting(file, home)


def test_a_merge_that_lists_its_teachers_and_domains_gets_the_new_one(file: Path, home: Path) -> None:
    listed = "  teachers: {sort: sort, reverse: reverse}\n  domains: [sort, reverse]\n  max_steps: 5\nevaluate:"
    file.write_text(
        TEXT.replace("  max_steps: 5\nevaluate:", listed).replace("shift: null", "shift: null\n  domains: [sort]")
    )
    add_expert(file, NewExpert("upper", "strings", tasks=["uppercase"]), home)
    config = load_run_file(file)
    assert config.teachers()["upper"] == {"upper": 1.0}
    assert config.merge.domains == ["sort", "reverse", "upper"] and config.evaluate.domains == ["sort", "upper"]
    remove_expert(file, "upper", home, with_domain=False)
    config = load_run_file(file)
    assert set(config.teachers()) == {"sort", "reverse"} and config.merge.domains == ["sort", "reverse"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (NewExpert("sort", "sort"), r"experts\.sort exists already"),
        (NewExpert("a"), "--domain: name a domain"),
        (NewExpert("a", "reasonin"), r"--domain: 'reasonin' .* did you mean 'reasoning'"),
        (NewExpert("a", "reasoning", tasks=["countdwn"]), r"did you mean 'countdown'"),
        (NewExpert("a", "sort", tasks=["sort"]), "--task and --option are for a new domain"),
        (NewExpert("a", "sort", like="revers"), r"--like: no expert 'revers' .* did you mean 'reverse'"),
        (NewExpert("a", "sort", method="rk"), "--train: 'rk' is not one of"),
        (NewExpert("a", "sort", settings=["max_step=3"]), r"did you mean 'max_steps'"),
        (NewExpert("a", "sort", settings=["max_steps"]), "--set 'max_steps': write KEY=VALUE"),
        (NewExpert("a", "strings", tasks=["sort", "reverse"]), "a strings domain has exactly one task"),
        (NewExpert("a", "endpoint", tasks=["sort"]), "endpoint"),
        (NewExpert("a", module=Path("mine.txt")), "name a Python file"),
        (NewExpert("a", "strings", tasks=["sort"], options=["taskk=3"]), "did you mean 'task'"),
    ],
)
def test_what_cannot_be_added_is_said_and_the_file_stays(file: Path, home: Path, asked: NewExpert, said: str) -> None:
    with pytest.raises(UserError, match=said):
        add_expert(file, asked, home)
    assert file.read_text() == TEXT and sorted(p.name for p in file.parent.glob("*run*")) == ["run.yaml"]


def test_what_cannot_be_removed_is_said(file: Path, home: Path) -> None:
    with pytest.raises(UserError, match=r"there is no experts\.srt .*did you mean 'sort'"):
        remove_expert(file, "srt", home, with_domain=False)
    (child := file.with_name("child.yaml")).write_text("extends: run.yaml\nname: child\n")
    with pytest.raises(UserError, match=r"experts\.sort is in run\.yaml, which this file extends"):
        remove_expert(child, "sort", home, with_domain=False)
    assert file.read_text() == TEXT


def test_a_domain_of_ones_own_starts_from_a_scaffold_whose_test_passes(file: Path, home: Path) -> None:
    module = file.parent / "domains" / "digits.py"
    said = add_expert(file, NewExpert("digits", module=module), home)
    assert str(module) in said[0]
    assert "kind: domains/digits.py" in file.read_text()
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(module.with_name("test_digits.py"))],
        capture_output=True,
        text=True,
        cwd=file.parent,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "2 passed" in tested.stdout


def test_a_change_of_ones_own_domain_trains_its_expert_again_and_a_broken_one_is_named(file: Path, home: Path) -> None:
    module = file.parent / "domains" / "digits.py"
    add_expert(file, NewExpert("digits", module=module), home)
    before = graph_of(file, home).node("experts/digits@0").key
    module.write_text(module.read_text() + "\n# A change.\n")
    assert graph_of(file, home).node("experts/digits@0").key != before
    (other := module.with_name("broken.py")).write_text("def load(name, options):\n    return None\n")
    for text, said in (
        (None, r"this one has no Options"),
        ("1 / 0\n", "ZeroDivisionError"),
    ):
        if text:
            other.write_text(text)
        with pytest.raises(UserError, match=rf"domains\.x\.kind: .*broken\.py: .*{said}"):
            add_expert(file, NewExpert("x", module=other), home)
    with pytest.raises(UserError, match=r"digit\.py: no such file.*did you mean '.*digits\.py'"):
        graph_of(file, home, f"domains.digits.kind={module.with_name('digit.py')}")
