"""Somebody else's code that would compute for years ends with a message that names its key."""

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest

from base.errors import UserError
from experts.isolation.gym import import_reasoning_gym
from experts.isolation.time_limit import processor_limit
from flows.check import draws as check_draws
from stages.model.tiny import character_tokenizer
from stages.rows import chat
from tests.unit.experts.test_own_domains import source
from tests.unit.flows.plan.test_check import SORT_ALONE, said

SHORT = 0.3
LOOP, END = "{% for _ in range(9999) %}", "{% endfor %}"


def compute() -> None:
    """What catches everything on its way."""
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


def test_computing_is_stopped_even_where_every_exception_is_caught():
    message = r"^a call takes more than 0\.3 s of processor time$"
    with pytest.raises(UserError, match=message), processor_limit(SHORT, "a call"):
        compute()
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL


def test_waiting_is_not_computing():
    with processor_limit(SHORT, "a call"):
        time.sleep(2 * SHORT)


def test_another_thread_has_no_limit():
    done = []

    def work():
        with processor_limit(1e-6, "a call"):
            done.append(sum(range(100_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_a_chat_template_of_nested_loops_is_refused(monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", SHORT)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = 5 * LOOP + 5 * END
    with pytest.raises(UserError, match=r"^the chat template of .*: to render one chat takes more than 0\.3 s"):
        chat.encode_prompt(tokenizer, "a")


def test_a_generator_that_its_parameters_make_endless_is_refused_by_name(tmp_path: Path, monkeypatch):
    import_reasoning_gym()  # Which is not counted here.
    monkeypatch.setattr(check_draws, "ONE_EXAMPLE_SECONDS", SHORT)
    tasks = "{basic_arithmetic: {min_terms: 900000000, max_terms: 1000000000}}"
    message = said(tmp_path, SORT_ALONE, f"domains.sort={{kind: reasoning, options: {{tasks: {tasks}}}}}")
    assert "domains.sort: drawing one example with these options takes more than 0.3 s of processor time" in message


@pytest.mark.parametrize("method", ["draw(self, split, count, seed)", "score(self, example, completion)"])
def test_a_domain_of_ones_own_that_never_returns_is_refused_by_name(tmp_path: Path, monkeypatch, method):
    monkeypatch.setattr(check_draws, "ONE_EXAMPLE_SECONDS", SHORT)
    (tmp_path / "own.py").write_text(source(f"def {method}:\n    while True:\n        pass"))
    message = said(tmp_path, SORT_ALONE, f"domains.sort={{kind: {tmp_path / 'own.py'}}}")
    assert "domains.sort: " in message and "takes more than 0.3 s of processor time" in message
