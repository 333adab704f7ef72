"""What a person's own domain gives is checked once: a mistake names domain, file and example, and exits with 2."""

import hashlib
import json
import textwrap
from pathlib import Path

import pytest
import yaml

from base.errors import UserError
from evals.measure.monitor import Monitor
from experts.domain import TRAIN
from experts.loading import load_domain
from stages.on_policy.rollout import Rollout, verifiable_rewards
from tests.unit.flows.cli.test_cli import mopd
from tests.unit.flows.run_file.test_config import MINIMAL

SOURCE = '''
import numpy, torch
from experts.domain import Domain, Example, Options as Base
from base.hashing import stable_hash


class Options(Base):
    """None."""


class Own(Domain):
    def draw(self, split, count, seed):
        return [self.example(f"{split} {n}") for n in range(count)]

    def example(self, prompt, **changes):
        return Example(**({"prompt": prompt, "answer": "a", "domain": self.name, "source": prompt} | changes))

    def score(self, example, completion):
        return 1.0

    def fingerprint(self):
        return stable_hash("own")

{body}


def load(name, options):
    return {load}
'''


def source(body="", load="Own(name)"):
    return SOURCE.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ")).replace("{load}", load)


def own(tmp_path, text):
    # Modules are kept by their path.
    path = tmp_path / f"own_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    path.write_text(text)
    return load_domain("mine", str(path), {})


def scored(tmp_path, expression):
    return own(tmp_path, source(f"def score(self, example, completion):\n    return {expression}"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("True", 1.0),
        ("False", 0.0),
        ("1", 1.0),
        ("numpy.float32(0.25)", 0.25),
        ("numpy.bool_(True)", 1.0),
        ("numpy.int64(1)", 1.0),
        ("torch.tensor(0.5)", 0.5),
        ("1 + 1e-9", 1.0),
    ],
)
def test_what_means_a_score_becomes_a_float(tmp_path, expression, value):
    domain = scored(tmp_path, expression)
    (example,) = domain.draw(TRAIN, 1, 0)
    for score in (domain.score(example, "x"), *domain.score_all([(example, "x")])):
        assert type(score) is float and score == value


WRONG = [
    ("None", "None (NoneType)"),
    ("float('nan')", "nan (float)"),
    ("float('inf')", "inf (float)"),
    ("72", "72 (int)"),
    ("-0.5", "-0.5 (float)"),
    ("'1.0'", "1.0 (str)"),
    ("numpy.float64('nan')", "nan (float64)"),
    ("torch.tensor([0.5, 0.5])", "tensor([0.5000, 0.5000]) (Tensor)"),
    ("[1.0]", "[1.0] (list)"),
    ("1j", "1j (complex)"),
]


@pytest.mark.parametrize(("expression", "shown"), WRONG)
def test_any_other_score_is_refused_as_reward_and_in_evaluation(tmp_path, expression, shown):
    domain = scored(tmp_path, expression)
    (example,) = domain.draw(TRAIN, 1, 0)
    rollout = Rollout(1, [example], [], ["x"], on_policy=[True], group_size=1)
    for ask in (
        lambda: domain.score(example, "x"),
        lambda: domain.score_all([(example, "x")]),
        lambda: verifiable_rewards(rollout, {"mine": domain}),
    ):
        with pytest.raises(UserError) as error:
            ask()
        message = str(error.value)
        assert "domains.mine.kind: " in message and "own_" in message
        assert f"score gives {shown}, for the example {example.id} with the prompt 'train 0'" in message
        assert "a score is a number from 0 to 1" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score_all(self, pairs):\n    return [1.0]", "score_all gives 1 scores for 2 completions"),
        ("def score_all(self, pairs):\n    return [1.0, 2.0]", r"score gives 2.0 \(float\)"),
        ("def score_all(self, pairs):\n    return None", r"own_\w+.py: score_all: TypeError"),
        ("def score(self, example, completion):\n    return 1 / 0", r"line \d+: score, for the .*: ZeroDivisionError"),
        ("def score(self, example, completion):\n    exit(0)", r"line \d+: score, for the .*: SystemExit: 0"),
    ],
)
def test_scores_of_many_and_errors_are_checked_too(tmp_path, body, message):
    domain = own(tmp_path, source(body))
    pairs = [(example, "x") for example in domain.draw(TRAIN, 2, 0)]
    with pytest.raises(UserError, match=message):
        domain.score_all(pairs)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return []", "draw gives 0 examples of split 'train' where 2 are asked for"),
        ("return None", r": draw: TypeError"),
        ("exit(0)", r"line \d+: draw: SystemExit: 0"),
        ("return ['a', 'b']", "example 1 of split 'train' is no Example but str"),
        ("return [self.example('a')] * 2", "example 2 of split 'train' has the prompt of an earlier one: 'a'"),
        ("return [self.example(' '), self.example('b')]", "example 1 of split 'train': .* is empty"),
        ("return [self.example('a', answer=4), self.example('b')]", "answer is no text but 4"),
        ("return [self.example('a', domain='x'), self.example('b')]", "domain is 'x' in place of 'mine'"),
        ("return [self.example('a', meta={1: {2}}), self.example('b')]", "meta cannot be stored as JSON"),
        ("return [self.example('a' * 2**20, source='a'), self.example('b')]", "prompt has 1,048,576 characters"),
        ("return [self.example(['a'], source='a'), self.example('b')]", "message 1 has no 'role' and 'content'"),
    ],
)
def test_examples_are_checked(tmp_path, body, message):
    domain = own(tmp_path, source(f"def draw(self, split, count, seed):\n    {body}"))
    with pytest.raises(UserError, match=rf"domains\.mine\.kind: .*own_.*{message}"):
        domain.draw(TRAIN, 2, 0)


def test_a_demonstration_is_text(tmp_path):
    domain = own(tmp_path, source("def draw(self, *asked):\n    return [self.example('a', answer='')]"))
    (example,) = domain.draw(TRAIN, 1, 0)
    with pytest.raises(UserError, match="demonstration gives no text but ''"):
        domain.demonstration(example, None)


def test_a_monitor_and_a_shipped_kind_see_the_same_scores(tmp_path):
    domain = scored(tmp_path, "True")
    monitor = Monitor({"mine": domain}, _MonitorConfig(), 4)
    assert len(monitor.examples) == 2 and json.dumps(domain.facts()) == "{}"
    assert isinstance(domain.score(monitor.examples[0], "x"), float)


class _MonitorConfig:
    every, examples = 1, 2


PLANS = {
    "load gives nothing": (source(load="None"), "load returned None; it must return a Domain"),
    "load raises": (source(load="1 / 0"), "load: ZeroDivisionError: division by zero"),
    "load ends": (source(load="exit(0)"), "load: SystemExit: 0"),
    "the file ends": ("exit(0)\n", "line 1: import: SystemExit: 0"),
    "the file ends with an error": ("import sys\nsys.exit('no')\n", "line 2: import: SystemExit: no"),
    "the file is no Python": ("def (\n", "import: SyntaxError"),
    "the fingerprint raises": (
        source("def fingerprint(self):\n    raise RuntimeError('no data')"),
        "fingerprint: RuntimeError: no data",
    ),
    "the fingerprint ends": (source("def fingerprint(self):\n    exit(0)"), "fingerprint: SystemExit: 0"),
    "the fingerprint is no text": (source("def fingerprint(self):\n    return 7"), "fingerprint gives no text but 7"),
    "Options are no model": (
        source().replace("class Options(Base)", "class Options"),
        "Options is not a pydantic model",
    ),
    "nothing is defined": ("x = 1\n", "this one has no Options and no load"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_with_such_a_file_exits_with_2_and_one_message(name, tmp_path: Path):
    text, said = PLANS[name]
    (tmp_path / "own.py").write_text(text)
    run = MINIMAL | {"domains": MINIMAL["domains"] | {"sort": {"kind": "own.py"}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    result = mopd("plan", tmp_path / "run.yaml", "--home", tmp_path / "home")
    assert result.exit_code == 2, result.stdout
    shown = " ".join(result.stderr.split())
    assert f"domains.sort.kind: {tmp_path / 'own.py'}: " in shown and said in shown
    assert "Traceback" not in result.stderr
