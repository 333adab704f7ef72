"""Model-written code cannot cheat, hang, crash or outlive the process that scores it."""

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from experts.domain import TRAIN, Example
from experts.isolation.sandbox import Failure, Limits, passes, run_calls, same_value
from experts.loading import load_domain
from tests.support.hostile import ENDS, GROUPS, HOSTILE, SCORED_ONE, VALUES

pytestmark = pytest.mark.slow

# What never ends is ended soon; of the others the time is not what is shown, and they may be slow.
QUICK, PATIENT = Limits(seconds=0.2), Limits(seconds=5)

SECRET = "MOPD_TEST_SECRET"
# Of the host's own memory, while the sandbox meets bombs of gigabytes.
MEMORY_BYTES = 400 * 1024 * 1024


def takes_one_integer(example: Example) -> bool:
    """Whether the example's function is called as the programs are; some give their argument back."""
    arguments, _ = ast.literal_eval(example.meta["tests"])
    return all([type(value) for value in call] == [int] for call in arguments)


def limits_of(name: str) -> Limits:
    """For a hostile program."""
    return QUICK if name.startswith("bombs") else PATIENT


class Host:
    """A file and the processes of the host, as they were, and a task whose reward runs what a model writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "file").write_text("as it was")
        self.domains = {
            limits: load_domain("code", "code_edit", {"timeout_seconds": limits.seconds}) for limits in (QUICK, PATIENT)
        }
        drawn = self.domains[PATIENT].draw(TRAIN, 50, seed=0)
        self.example = next(example for example in drawn if takes_one_integer(example))
        self.processes = self._processes()
        self.memory = psutil.Process().memory_info().rss

    def program(self, name: str) -> str:
        """A hostile program, aimed at this host."""
        return HOSTILE[name].replace("{file}", str(self.folder / "file")).replace("{secret}", SECRET)

    def completion(self, name: str) -> str:
        """The same program as an answer to the example: its function has the name that is called."""
        return re.sub(r"\bf\b(?!')", self.example.meta["entry"], self.program(name))

    def harm(self) -> list[str]:
        """What is not as it was."""
        found = []
        if {path.name: path.read_text() for path in self.folder.iterdir()} != {"file": "as it was"}:
            found.append("files")
        if self._processes() > self.processes + 1:
            found.append("processes")
        if psutil.Process().memory_info().rss > self.memory + MEMORY_BYTES:
            found.append("memory")
        return found

    def _processes(self) -> int:
        return len(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """What must not be touched."""
    host = Host(tmp_path_factory.mktemp("host"))
    os.environ[SECRET] = "a secret of the host"
    yield host
    del os.environ[SECRET]


def test_the_suite_is_as_large_as_it_says():
    assert len(HOSTILE) - len(GROUPS["absent"]) >= 40
    assert {group: len(programs) for group, programs in GROUPS.items()} == {
        "files": 20, "bombs": 35, "escapes": 12, "absent": 27, "sources": 3, "forgeries": 23, "tampering": 10,
    }  # fmt: skip
    assert passes(SCORED_ONE, "f", [[1], [2]], [1, 2], PATIENT)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_scores_0_and_the_host_is_unharmed(name, host):
    started = time.monotonic()
    outputs = run_calls(host.program(name), "f", [[1], [2]], limits_of(name))
    assert not passes(host.program(name), "f", [[1], [2]], [1, 2], limits_of(name))
    assert time.monotonic() - started < 60
    sys.set_int_max_str_digits(10_000)
    told = repr(outputs)
    sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
    assert "a secret of the host" not in told and "as it was" not in told
    ended = outputs.reason if isinstance(outputs, Failure) else VALUES
    assert re.search(ENDS[name.split(":")[0]], ended), f"it does not try what it says: {ended}"
    assert host.harm() == []
    assert passes(SCORED_ONE, "f", [[1], [2]], [1, 2], PATIENT)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_completion_is_not_rewarded(name, host):
    assert host.domains[limits_of(name)].score(host.example, host.completion(name)) == 0.0
    assert host.harm() == []
    assert host.domains[PATIENT].score(host.example, host.example.answer) == 1.0


def test_a_killed_worker_is_a_failure_and_is_replaced():
    killed = run_calls("def f(a):\n x = 3\n while True: x = x * x", "f", [[1]], QUICK)
    assert isinstance(killed, Failure)
    assert run_calls("def f(a): return a + 1", "f", [[1]]) == [2]


def test_printing_stays_inside(capfd):
    assert run_calls("print('defining')\ndef f(a):\n print('calling')\n return a", "f", [[1]]) == [1]
    assert capfd.readouterr().out == ""


def test_each_run_starts_fresh():
    assert run_calls("secret = 5\ndef f(): return secret", "f", [[]]) == [5]
    assert isinstance(run_calls("def f(): return secret", "f", [[]]), Failure)


def test_arguments_on_the_host_are_not_changed():
    values = [1, 2]
    assert run_calls("def f(a):\n a.append(3)\n return a", "f", [[values]]) == [[1, 2, 3]]
    assert values == [1, 2]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1, True),
        (True, 1, False),
        (1, 1.0, False),
        ([1, [True]], [1, [1]], False),
        ((1, 2), [1, 2], False),
        ([1, (2, "x")], [1, (2, "x")], True),
        ([1, 2], [1, 2, 3], False),
        ({1: "a"}, {True: "a"}, False),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": [1]}, {"a": [1]}, True),
        ({1, 2}, {2, 1}, True),
        ({1}, {True}, False),
        ({(1, 2)}, {(1, True * 2)}, True),
        ({(1, 2)}, {(True, 2)}, False),
        (float("nan"), float("nan"), True),
        (0.1 + 0.2, 0.3, True),
        (0.3, 0.30001, False),
        (None, 0, False),
        (object(), object(), False),
    ],
)
def test_values_are_compared_by_exact_type(left, right, same):
    assert same_value(left, right) is same
    assert same_value(right, left) is same


CHILDREN = """
import multiprocessing, os, psutil
from experts.isolation.sandbox import run_calls

def work(queue):
    ok = run_calls("def f(a): return a", "f", [[1]]) == [1]
    queue.put((ok, [child.pid for child in psutil.Process().children()]))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    ok, workers = queue.get(timeout=30)
    child.join(30)
    assert run_calls("def f(a): return a", "f", [[1]]) == [1]
    workers += [child.pid for child in psutil.Process().children()]
    print(ok, child.exitcode, *workers)
"""


def test_workers_end_with_the_process_and_a_fork_after_the_import_works(tmp_path):
    script = tmp_path / "children.py"
    script.write_text(CHILDREN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    ok, exit_code, *workers = done.stdout.split()
    assert (ok, exit_code) == ("True", "0")
    assert len(workers) >= 2
    assert not [pid for pid in workers if psutil.pid_exists(int(pid))]


FORK_AFTER_USE = """
import os, sys
from experts.isolation.sandbox import run_calls
run_calls("def f(a): return a", "f", [[1]])
if os.fork() == 0:
    try:
        run_calls("def f(a): return a", "f", [[1]])
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_fork_after_use_is_told_instead_of_hanging():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FORK_AFTER_USE], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 3
    assert "was forked from" in done.stdout
