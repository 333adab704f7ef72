"""Model-written code cannot cheat, hang, crash or outlive the process that scores it."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from experts.sandbox import Failure, Limits, passes, run_calls, same_value

QUICK = Limits(seconds=0.2)

HOSTILE = {
    "equal_to_all": "class A:\n def __eq__(s, o): return True\ndef f(a): return A()",
    "infinite_loop": "def f(a):\n while True: pass",
    "infinite_loop_at_import": "while True: pass",
    "exit": "import sys\nsys.exit(0)",
    "raised_exit": "def f(a): raise SystemExit",
    "interrupt": "def f(a): raise KeyboardInterrupt",
    "recursion": "def f(a): return f(a)",
    "huge_power": "def f(a): return 10**10**8",
    "huge_integer": "def f(a): return 10**5000",
    "huge_list": "def f(a): return [0]*10**9",
    "sleep": "import time\ndef f(a):\n time.sleep(30)\n return a",
    "flood": "def f(a):\n while True: print('x' * 1000)",
    "deep_value": "def f(a):\n x = []\n for i in range(100000): x = [x]\n return x",
    "cycle": "def f(a):\n x = []\n x.append(x)\n return x",
    "tampering": "def f(a):\n calls.append(1)\n return a",
    "shadowed": "expected = 1\ndef f(a): return expected",
    "lone_surrogate": "def f(a): return '\ud800'",
    "nested_source": "def f(a): return " + "(" * 5000 + "1" + ")" * 5000,
    "open_string": "def f(a): return a\n'''",
    "file": "def f(a): return open('/etc/hostname').read()",
    "nothing": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_fails_quickly_and_the_sandbox_goes_on(name):
    started = time.monotonic()
    assert not passes(HOSTILE[name], "f", [[1], [2]], [1, 2], QUICK)
    assert time.monotonic() - started < 5
    assert passes("def f(a): return a", "f", [[1], [2]], [1, 2], QUICK)


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
from experts.sandbox import run_calls

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
from experts.sandbox import run_calls
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
