"""A home whose databases are migrated: over an empty one the first start of Prefect and MLflow takes half a minute."""

import contextlib
import importlib.metadata
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from flows.servers.start import choose_port, start_prefect, stop, wait_until_ready

# Of variables that name a home, its servers or their settings.
PREFIXES = ("PREFECT_", "MLFLOW_", "MOPD_")
DATABASES = ("prefect/prefect.db", "mlflow.db")


def with_databases(home: Path, names: Sequence[str] = DATABASES) -> Path:
    """Put empty databases of Prefect and MLflow into a home that has none; they are made once for all tests."""
    versions = "-".join(importlib.metadata.version(name) for name in ("prefect", "mlflow"))
    kept = Path(tempfile.gettempdir()) / f"mopd-tests-{os.getuid()}" / versions
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            _make(kept)
    for name in names:
        if not (home / name).exists():
            _copy(kept / name, home / name)
    return home


def clean_environment(*more: str) -> dict[str, str]:
    """This process's environment without the variables of a home, and without those with a further prefix."""
    return {name: value for name, value in os.environ.items() if not name.startswith((*PREFIXES, *more))}


def _make(kept: Path) -> None:
    from mlflow import MlflowClient

    from flows.tracking.models import tracking_store

    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        home = Path(folder) / "home"
        server = start_prefect(home, "127.0.0.1", choose_port("127.0.0.1", 24300, "Prefect"))
        try:
            # Not the store that the environment names.
            uri = f"sqlite:///{home / 'mlflow.db'}"
            with tracking_store(uri):
                MlflowClient(uri).search_experiments()
            wait_until_ready(server)
        finally:
            stop([server])
        whole = Path(folder) / "whole"
        for name in DATABASES:
            _copy(home / name, whole / name)
        whole.rename(kept)


def _copy(source: Path, place: Path) -> None:
    """Copy a database whole, with what stands beside its file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(place)) as other:
        one.backup(other)
