"""A home whose databases are migrated: over an empty one the first start of Prefect and MLflow takes half a minute."""

import contextlib
import importlib.metadata
import os
import sqlite3
import tempfile
from pathlib import Path

from filelock import FileLock

from flows.servers import choose_port, mlflow_uri, start_prefect, stop, wait_until_ready

DATABASES = ("prefect/prefect.db", "mlflow.db")


def with_databases(home: Path) -> Path:
    """Put empty databases of Prefect and MLflow into a home; they are made once for all tests of these versions."""
    versions = "-".join(importlib.metadata.version(name) for name in ("prefect", "mlflow"))
    kept = Path(tempfile.gettempdir()) / f"mopd-tests-{os.getuid()}" / versions
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            _make(kept)
    for name in DATABASES:
        _copy(kept / name, home / name)
    return home


def _make(kept: Path) -> None:
    from mlflow import MlflowClient

    from flows.mlflow_models import tracking_store

    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        home = Path(folder) / "home"
        server = start_prefect(home, "127.0.0.1", choose_port("127.0.0.1", 24300, "Prefect"))
        try:
            with tracking_store(mlflow_uri(home)):
                MlflowClient(mlflow_uri(home)).search_experiments()
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
