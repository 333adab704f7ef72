"""A run whose Prefect server dies while another home's server takes its port."""

import re
import signal
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from base.store.checkpoint import Store
from flows.servers import start as servers
from tests.integration.run.test_pipeline import PATIENCE_SECONDS, Bench
from tests.support.homes import with_databases
from tests.support.processes import HOST, eventually


def test_a_run_goes_on_without_its_prefect_and_tells_no_other_home_anything(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with_databases(bench.home)
    process = bench.start("experts.sort.train.rl.max_steps=120")
    stranger = None
    try:
        found = eventually(lambda: re.search(r"^Prefect: (\S+)", bench.log, re.MULTILINE), within=PATIENCE_SECONDS)
        port = urlsplit(found[1]).port
        bench.wait_for_steps("experts/sort@0")
        (server,) = [p for p in psutil.Process(process.pid).children() if "prefect" in p.cmdline()]
        family = [server, *server.children(recursive=True)]
        for each in family:
            each.send_signal(signal.SIGKILL)
        eventually(lambda: servers.choose_port(HOST, port, "a test's server") == port)
        stranger = servers.start_prefect(with_databases(tmp_path / "other"), HOST, port)
        servers.wait_until_ready(stranger)
        assert process.wait(timeout=PATIENCE_SECONDS) == 0, bench.log
        assert "Traceback" not in bench.log and "student" in bench.log
        assert "Prefect's server of this run ended" in bench.log
    finally:
        process.kill()
        process.wait()
        servers.stop([stranger] if stranger else [])
    assert Store(bench.home).find(bench.key("student@0", "experts.sort.train.rl.max_steps=120"))
    with sqlite3.connect(tmp_path / "other" / "prefect" / "prefect.db") as database:
        for table in ("flow_run", "task_run", "artifact", "log"):
            assert database.execute(f"select count(*) from {table}").fetchall() == [(0,)], table
