"""The Prefect server of a run: who can reach it, and what still reaches the terminal beside it."""

import json
import subprocess
import sys

from tests.support.homes import clean_environment

SCRIPT = """
import json, logging, sys
from pathlib import Path
import psutil
from flows.run.session import prefect_session

with prefect_session(Path(sys.argv[1])):
    from prefect.logging.configuration import setup_logging

    setup_logging()
    logging.getLogger("flows.tracking.outbox").warning("the tracking server does not answer")
    below = psutil.Process().children(recursive=True)
    listening = [c.laddr.ip for p in below for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    print(json.dumps(listening))
logging.getLogger("flows.tracking.outbox").warning("after it")
"""


def test_the_server_of_a_run_is_on_the_loopback_and_warnings_reach_the_terminal_once(tmp_path):
    clean = clean_environment()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"127.0.0.1"}
    assert done.stderr.count("the tracking server does not answer") == 1
