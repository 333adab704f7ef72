"""Tests that need an extra are skipped with the command that installs it; `--every-extra` refuses to start without."""

import importlib.util
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core; threads for all cores would wait for those of the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def has_package(name: str) -> bool:
    """Whether a Python package is installed."""
    return importlib.util.find_spec(name) is not None


def has_postgresql() -> bool:
    """Whether Debian's PostgreSQL server is installed."""
    return any(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def has_browser() -> bool:
    """Whether the PATH has a browser that Playwright can start."""
    return any(shutil.which(name) for name in BROWSERS)


# Marker: whether what it needs is there.
EXTRAS = {
    "vllm": lambda: has_package("vllm"),
    "harness": lambda: has_package("lm_eval"),
    "bitsandbytes": lambda: has_package("bitsandbytes"),
    "stores": lambda: has_package("moto") and has_package("s3fs") and has_package("psycopg") and has_postgresql(),
    "browser": has_browser,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-extra", action="store_true", help="Fail at once if an extra is missing; skip no test.")


def pytest_configure(config: pytest.Config) -> None:
    missing = missing_extras()
    if config.getoption("--every-extra") and missing:
        raise pytest.UsageError(f"--every-extra: run {' and '.join(f'make setup-{name}' for name in missing)} first")
    if threading.current_thread() is threading.main_thread():
        # A shell's `&` makes what it starts ignore Ctrl-C, `nohup` the end of the terminal; so would the commands under
        # test.
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_extras()
    for item in items:
        for name in missing:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"needs make setup-{name}"))


def missing_extras() -> list[str]:
    """The extras that are not installed, in the order of `EXTRAS`."""
    return [name for name, is_there in EXTRAS.items() if not is_there()]
