"""The exit code of an interrupted process."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, sys, time
from base.signals import interrupt_once, keep_exit_code

interrupt_once()
try:
    exec("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
except KeyboardInterrupt:
    sys.exit(130)
finally:
    keep_exit_code()
"""


def test_an_interrupt_in_a_text_that_is_run_leaves_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-m", "program"], env={"PYTHONPATH": f"{root}:{tmp_path}"}, check=False)
    assert done.returncode == 130
