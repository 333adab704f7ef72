"""What counts as the number 72: percentages, denials, units, second thoughts."""

import json
from pathlib import Path

import pytest

from experts.domain import TRAIN, Domain, Example, load_domain

RIGHT = ("72", "72.0", "72/1", "$72", "**72**", "72 apples", "The answer is 72", "73 no wait 72", "\\boxed{72}")
RIGHT += ("7200%",)
WRONG = ("", "-72", "172", "1e2", "0.72", "72%", "not 72", "it is not 72", "the answer is not 72", "\\boxed{not 72}")
WRONG += ("72 or 73", "72, 73", "72 no wait 73", "72 is wrong", "answer: 172", "none")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Domain, Example]:
    path: Path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"question {n}", "a": "72"}) + "\n" for n in range(30)))
    options = {"path": str(path), "prompt_field": "q", "answer_field": "a", "scorer": "numeric"}
    domain = load_domain("sums", "hub", options)
    return domain, domain.draw(TRAIN, 1, 0)[0]


@pytest.mark.parametrize("answer", RIGHT)
def test_it_is_the_number(asked, answer):
    assert asked[0].score(asked[1], answer) == 1.0


@pytest.mark.parametrize("answer", WRONG)
def test_it_is_not(asked, answer):
    assert asked[0].score(asked[1], answer) == 0.0
