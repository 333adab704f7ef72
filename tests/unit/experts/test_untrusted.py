"""What a model writes cannot harm the host, hang it or go unscored through the verifiers of others that evaluate it."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from experts.domain import TRAIN
from experts.isolation import untrusted, untrusted_worker
from experts.isolation.gym import import_reasoning_gym
from experts.isolation.untrusted import REASONING, VerifierError, VerifierLostError
from experts.kinds import answers
from experts.kinds.reasoning import is_safe_to_verify, only_compares
from experts.loading import load_domain
from stages.on_policy.rollout import Rollout
from stages.on_policy.signals import RewardSignal
from tests.support.processes import below

pytestmark = pytest.mark.slow

SECRET = "MOPD_TEST_SECRET"
WORKER = "experts.isolation.untrusted_worker reasoning"
# A worker may have to be started first, on a busy machine.
SLACK_SECONDS = 60
PARTIAL_CREDIT = 0.05

TIME_BOMBS = {
    "a simplification without end": "(x+sin(x)+cos(x)+tan(x)+exp(x))**99*(1+x)**99",
    "a tower of powers": "9**9**9**9",
    "a tower in brackets": "(((9**99)**99)**99)**99",
    "a fraction of a huge exponent": "1e999999999",
}
HOSTILE = TIME_BOMBS | {
    "an attribute escape": "().__class__.__base__.__subclasses__()",
    "a call of the system": "__import__('os').system('touch {folder}/made')",
    "a file opened for writing": "open('{folder}/made', 'w')",
    "a file emptied": "open('{folder}/file', 'w').close()",
    "a file removed": "__import__('os').remove('{folder}/file')",
    "a file read": "open('{folder}/file').read()",
    "the environment": "__import__('os').environ['" + SECRET + "']",
    "the parent's environment": "open(f'/proc/{__import__(\"os\").getppid()}/environ').read()",
    "a signal to the parent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "a fork": "__import__('os').fork()",
    "a socket": "__import__('socket').create_connection(('127.0.0.1', 1))",
    "a foreign function": "__import__('ctypes').string_at(0)",
    "the end of the process": "__import__('os')._exit(0)",
    "a list that fills the memory": "[0]*10**11",
    "a string that fills the memory": "'x'*10**11",
    "deep nesting": "(" * 5000 + "1" + ")" * 5000,
    "deep lists": "[" * 5000 + "]" * 5000,
    "a huge number": "9" * 19_000,
    "not a number": "nan",
    "infinity": "1e400",
    "an object equal to everything": "type('A', (), {'__eq__': lambda s, o: True, '__float__': lambda s: 24.0})()",
    "a list equal to everything": "type('A', (list,), {'__eq__': lambda s, o: True})()",
    "a null byte": "1\0",
    "a lone surrogate": "\ud800",
}
# Each evaluates or computes what it is given in its own way.
TASKS = ("simple_integration", "countdown", "string_insertion", "coin_flip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "file").write_text("as it was")
    os.environ[SECRET] = "a secret of the host"
    yield folder
    del os.environ[SECRET]


@pytest.fixture(scope="module")
def examples():
    domains = {task: load_domain("logic", "reasoning", {"tasks": {task: {}}}) for task in TASKS}
    return {task: (domain, domain.draw(TRAIN, 1, seed=0)[0]) for task, domain in domains.items()}


OTHERS: set[int] = set()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def others() -> None:
    """Processes that other files of tests left in this one, such as sandboxes."""
    OTHERS.update(child.pid for child in psutil.Process().children(recursive=True))


def children() -> int:
    return sum(child.pid not in OTHERS for child in psutil.Process().children(recursive=True))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("task", TASKS)
def test_a_hostile_answer_scores_nothing_and_the_host_is_unharmed(task, name, folder, examples, monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1.0)
    domain, example = examples[task]
    started = time.monotonic()
    assert domain.score(example, HOSTILE[name].replace("{folder}", str(folder))) <= PARTIAL_CREDIT
    assert time.monotonic() - started < SLACK_SECONDS
    assert contents(folder) == {"file": "as it was"}
    assert children() <= untrusted.WORKERS + 1


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_still_scores_1_after_them(task, examples):
    domain, example = examples[task]
    assert domain.score(example, example.answer) == 1.0


# countdown's own task evaluates its answer as Python; asked here without the guard that stands before it.
DATASET = {"key": "bare", "task": "countdown", "parameters": {}, "size": 1}
ENTRY = {"answer": "1+2", "metadata": {"numbers": [1, 2], "target": 3}}


def bare_score(answer):
    return REASONING.ask("score", {"key": "bare", "answer": answer, "entry": ENTRY}, DATASET)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_process_alone_holds_what_the_guard_would_let_through(name, folder, monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1.0)
    text = HOSTILE[name].replace("{folder}", str(folder))
    try:
        assert bare_score(text) <= PARTIAL_CREDIT
    except VerifierError as error:
        assert "secret of the host" not in str(error) and "as it was" not in str(error)
    assert contents(folder) == {"file": "as it was"}
    monkeypatch.undo()
    assert bare_score("1+2") == 1.0


def worker_pids(library=WORKER):
    return {worker.pid for worker in below(psutil.Process(), library)}


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("open('/tmp/made', 'w')", "open"),
        ("__import__('os').system('true')", "os.system"),
        ("__import__('os').fork()", "os.fork"),
        ("__import__('socket').socket()", "socket"),
        ("__import__('os').kill(1, 0)", "os.kill"),
        ("open('/etc/hostname').read()", "open"),
    ],
)
def test_what_a_worker_may_not_do_is_refused_named_and_costs_no_process(text, action, caplog):
    caplog.set_level("DEBUG", "experts.isolation.untrusted")
    bare_score("1+2")
    before = worker_pids()
    assert bare_score(text) <= PARTIAL_CREDIT
    assert f"a verifier was refused an action: {action}" in caplog.text
    assert bare_score("1+2") == 1.0
    assert worker_pids() == before


def test_a_path_that_is_not_plain_text_is_not_believed():
    class Two(str):
        """Shows one path and may open another."""

    assert untrusted_worker._only_reads(("/usr/lib/x", "r", 0), ("/usr/lib/",))
    assert not untrusted_worker._only_reads((Two("/usr/lib/x"), "r", 0), ("/usr/lib/",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__import__('os').write(3, b'{\"value\": 1.0}\\n')", "Extra data|answered with another token"),
        ("__import__('os')._exit(0)", r"its process ended \(0\)"),
    ],
)
def test_a_worker_that_ends_or_answers_out_of_turn_is_lost(text, reason):
    with pytest.raises(VerifierLostError, match=reason):
        bare_score(text)


def bold(count):
    return [(f"The answer is **{number}**.", str(number)) for number in range(70, 70 + count)]


def test_right_answers_in_bold_cost_no_process(caplog):
    assert answers.same_value("3", ["3"])
    before = worker_pids("experts.isolation.untrusted_worker values")
    assert [answers.same_value(text, [gold]) for text, gold in bold(60)] == [True] * 60
    assert worker_pids("experts.isolation.untrusted_worker values") == before
    assert "replaced" not in caplog.text


@pytest.mark.parametrize("ending", ["an end", "a timeout"])
def test_a_lost_verifier_is_counted_and_in_the_log_of_the_stage(ending, tmp_path, monkeypatch):
    rows = tmp_path / "sums.jsonl"
    rows.write_text('{"q": "2+2?", "a": "$4x$"}\n{"q": "2+3?", "a": "$5x$"}\n')
    options = {"path": str(rows), "prompt_field": "q", "answer_field": "a", "scorer": "numeric"}
    domain = load_domain("sums", "hub", options | {"held_out_share": 0.001})
    example = next(one for one in domain.draw(TRAIN, 2, seed=0) if one.answer == "$4x$")
    assert domain.score(example, "$4x$") == 1.0
    assert (domain.facts(), domain.news()) == ({}, [])
    with monkeypatch.context() as patch:
        if ending == "a timeout":
            patch.setattr(untrusted, "SECONDS", 1.0)
            lost = "$9^{9^{9^{9^{9}}}}+1$"
        else:
            patch.setattr(untrusted._Worker, "hear", ended)
            lost = "$4x$"
        assert domain.score(example, lost) == 0.0
    assert domain.facts() == {"verifier_lost": 1.0}
    rollout = Rollout(1, [example] * 2, [], ["$4x$", "$5x$"], on_policy=[True] * 2, group_size=2)
    signals = RewardSignal({"sums": domain}).score(rollout, [])
    assert signals.values["reward"] == [1.0, 0.0]
    assert signals.facts == {"verifier_lost/sums": 1.0}
    (line,) = domain.news()
    assert "domains.sums: 1 completion(s) scored 0 because the verifier was lost" in line
    assert domain.news() == []


def ended(worker, seconds):
    worker.process.kill()
    raise ConnectionError("no whole answer")


def test_a_reasoning_verifier_that_is_lost_is_counted(examples, monkeypatch):
    domain, example = examples["simple_integration"]
    before = domain.facts().get("verifier_lost", 0.0)
    monkeypatch.setattr(untrusted, "SECONDS", 1.0)
    assert domain.score(example, TIME_BOMBS["a simplification without end"]) <= PARTIAL_CREDIT
    assert domain.facts() == {"verifier_lost": before + 1}
    assert len(domain.news()) == 1


def test_a_worker_has_neither_secrets_nor_room(folder):
    assert bare_score("1+2") == 1.0
    (worker,) = below(psutil.Process(), "experts.isolation.untrusted_worker")[-1:]
    assert SECRET in os.environ and SECRET not in worker.environ()
    assert set(worker.environ()) <= {
        "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS",
        "LC_CTYPE", *untrusted._KEPT_VARIABLES,
    }  # fmt: skip
    assert worker.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_NPROC) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert worker.rlimit(psutil.RLIMIT_NOFILE)[1] <= 64
    assert worker.rlimit(psutil.RLIMIT_AS)[1] <= 2 * 1024**3


@pytest.mark.parametrize("threaded", [False, True])
def test_a_tower_of_powers_ends_math_verify_in_any_thread(threaded, monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1.0)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        ask = pool.submit if threaded else lambda function, *given: function(*given)
        with pytest.raises(VerifierLostError, match="no answer within 1 s"):
            told = ask(answers.same_value, "$9^{9^{9^{9^{9}}}}+1$", ["$3x$"])
            if threaded:
                told.result()
    assert time.monotonic() - started < SLACK_SECONDS
    monkeypatch.undo()
    assert answers.same_value("$3$", ["3"])


def test_threads_share_the_workers():
    def score(number):
        return bare_score("1+2" if number % 2 else "1-2")

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(score, range(64)))
    assert scores == [PARTIAL_CREDIT, 1.0] * 32
    assert len(below(psutil.Process(), WORKER)) <= untrusted.WORKERS


def test_a_worker_outlives_the_thread_that_needed_it_first():
    def pids():
        bare_score("1+2")
        return {worker.pid for worker in below(psutil.Process(), WORKER)}

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(pids).result()
    time.sleep(0.2)
    assert pids() == first


def test_a_worker_that_was_killed_is_replaced_unnoticed():
    bare_score("1+2")
    for worker in below(psutil.Process(), WORKER):
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
    assert bare_score("1+2") == 1.0


CHILDREN = """
import os, sys, threading, time, psutil
from experts.isolation import untrusted
from experts.kinds.answers import same_value
def workers():
    return {child.pid for child in psutil.Process().children() if "values" in child.cmdline()}
assert same_value("$3$", ["3"])
first = workers()
child = os.fork()
if child == 0:
    ok = same_value("$3$", ["3"]) and not same_value("$4$", ["3"])
    print(*workers(), flush=True)
    os._exit(0 if ok and workers().isdisjoint(first) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same_value("$3$", ["3"]) and workers() == first
print(*first, flush=True)
untrusted.SECONDS = 600
threading.Thread(target=same_value, args=("$9^{9^{9^{9^{9}}}}+1$", ["$3x$"]), daemon=True).start()
used = psutil.Process(*first).cpu_times().user
while psutil.Process(*first).cpu_times().user < used + 0.5:
    time.sleep(0.05)
os.kill(os.getpid(), 9)
"""


def test_a_fork_has_workers_of_its_own_and_even_busy_ones_die_with_their_process():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 240
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_only_the_verifier_that_compares_strings_runs_in_this_process():
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    here = {task for task in DATASETS if only_compares(task)}
    assert {"basic_arithmetic", "gcd", "letter_counting"} <= here
    assert here.isdisjoint({*TASKS, "chain_sum", "spiral_matrix", "composite", "polynomial_multiplication"})
    assert len(here) < len(DATASETS) / 2


def test_the_guard_knows_every_verifier_that_evaluates_text():
    """A new reasoning-gym whose verifiers evaluate more text fails here: its task then wants a guard of its own."""
    import inspect

    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    from experts.kinds.reasoning import EXPRESSION_VERIFIERS, LITERAL_VERIFIERS, UNREPEATABLE

    evaluating = {
        task
        for task, (kind, _) in DATASETS.items()
        if any(call in inspect.getsource(kind.score_answer) for call in ("eval(", "exec(", "parse_expr(", "sympify("))
    }
    # number_sorting evaluates the gold answer alone.
    assert evaluating - UNREPEATABLE - {"number_sorting"} == LITERAL_VERIFIERS | EXPRESSION_VERIFIERS
    assert not any(is_safe_to_verify(task, "().__class__") for task in LITERAL_VERIFIERS | EXPRESSION_VERIFIERS)


def test_a_task_that_cannot_be_prepared_is_the_host_s_trouble():
    with pytest.raises(RuntimeError, match=r"cannot prepare wrong: .*'no_such_task' not registered"):
        REASONING.ask("score", {}, {"key": "wrong", "task": "no_such_task", "parameters": {}, "size": 1})


def test_the_child_gives_what_the_verifier_gives_here(examples):
    reasoning_gym = import_reasoning_gym()
    for task, (domain, example) in examples.items():
        partial = load_domain("partial", "reasoning", {**domain.options.model_dump(), "partial": True})
        stored = replace(example, meta=json.loads(json.dumps(example.meta)))
        entry = {"question": "", "answer": stored.meta["answer"], "metadata": stored.meta["metadata"]}
        for answer in (stored.answer, "1/2", "2 + 3", "1"):
            here = float(reasoning_gym.create_dataset(task, seed=0, size=1).score_answer(answer, entry))
            assert partial.score(stored, answer) == here
