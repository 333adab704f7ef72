"""Signals: each that ends a command ends it once, without a traceback, and leaves no process behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.engines.fork_client import ForkServer, child_environment
from tests.integration.run.test_pipeline import LONG, Bench, processes_of
from tests.support.homes import with_databases
from tests.support.processes import ended, eventually

HANGUP_BIT = 1 << (signal.SIGHUP - 1)


def catches_hangup(pid: int) -> bool:
    """Whether a process has its handlers already."""
    line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) & HANGUP_BIT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_two_signals_in_the_first_second_leave_no_traceback(tmp_path, number):
    bench = Bench(tmp_path)
    with_databases(bench.home)
    with subprocess.Popen(bench.command(), env=bench.environment, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: catches_hangup(process.pid))
        process.send_signal(number)
        process.send_signal(number)
        said = process.communicate(timeout=240)[1]
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said, said


def test_a_terminal_that_closes_ends_a_run_as_ctrl_c_does(tmp_path):
    bench = Bench(tmp_path)
    with_databases(bench.home)
    process = bench.start(LONG)
    try:
        bench.wait_for_steps("experts/sort@0")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=240) == 130
    finally:
        process.kill()
        process.wait()
    assert "resumes the r" in bench.log and "Traceback" not in bench.log
    assert bench.query("prefect/prefect.db", "select state_name from flow_run") == [("Cancelled",)]
    assert processes_of(bench.home) == []


def test_nohup_keeps_a_command_from_ending_with_its_terminal(tmp_path):
    bench = Bench(tmp_path)
    with_databases(bench.home)
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    plan = [sys.executable, "-m", "flows.cli.entry", "ui", "--home", str(bench.home)]
    with subprocess.Popen([sys.executable, "-c", ignoring, *plan], env=bench.environment, stdout=-3) as process:
        try:
            eventually((bench.home / "servers" / "prefect.json").exists, within=600)
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=240) == 0
        finally:
            process.kill()


def test_a_fork_server_that_still_imports_ends_with_its_client(tmp_path, monkeypatch):
    """It imports a module that takes for ever, and its client is killed meanwhile."""
    (tmp_path / "endless.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\ntime.sleep(3600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    server = ForkServer(tmp_path / "log", child_environment(1), preload=("endless",))
    try:
        eventually((tmp_path / "importing").exists)
        # What the kernel does with the client's socket when the client is killed.
        server._control.close()
        eventually(lambda: ended(server.pid))
    finally:
        if psutil.pid_exists(server.pid):
            os.kill(server.pid, signal.SIGKILL)
        server._process.wait()
