"""Processes of one stage, forked from a server that has imported torch and the stages: an import costs ten seconds."""

import contextlib
import functools
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
PRELOADED = "tests.support.preloaded"
HOST = "127.0.0.1"
WAIT_SECONDS = 900


def run_script(script: Path, arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Run a script as `torchrun` does, in so many processes on the CPU.

    Args:
        script: Runs as `__main__`, with torch and the stages already imported.
        arguments: Its arguments.
        processes: With several, each has torchrun's variables of its rank.

    Returns:
        What each process prints.

    Raises:
        AssertionError: one fails; the message has the end of its output.
    """
    # As under torchrun, the ranks meet at a store that none of them holds.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    outputs = [script.with_name(f"{script.name}.{rank}.out") for rank in range(processes)]
    running = []
    for rank, output in enumerate(outputs):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        variables = {name: str(value) for name, value in own.items()} | {
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = _context().Process(
            target=_run, args=(str(script), list(arguments), variables if processes > 1 else {}, str(output))
        )
        process.start()
        running.append(process)
    try:
        for process in running:
            process.join(WAIT_SECONDS)
        codes = [process.exitcode for process in running]
        printed = [output.read_text() for output in outputs]
        assert codes == [0] * processes, f"{codes}\n" + "\n".join(text[-3000:] for text in printed)
    finally:
        for process in running:
            process.kill()
    return printed


@functools.cache
def _context() -> ForkServerContext:
    """The context with the server of this test process, which ends with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    # The server keeps the environment in which it starts, and imports from its Python path.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("PYTHONPATH", str(ROOT))):
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _run(script: str, arguments: Sequence[str], variables: Mapping[str, str], output: str) -> None:
    with Path(output).open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    sys.argv = [script, *arguments]
    with contextlib.chdir(Path(script).parent):
        runpy.run_path(script, run_name="__main__")
