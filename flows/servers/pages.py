"""Addresses in MLflow's pages. `base` is the server; empty for a link within the pages.

MLflow opens in a mode for language-model applications, whose side bar has no models; the query chooses the one for
training. It belongs behind the fragment, where the pages' router reads it. Free of mlflow.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from base.store.checkpoint import write_whole

MODE = {"workflowType": "machine_learning"}


def experiment_page(base: str, experiment_id: str) -> str:
    """The runs of an experiment."""
    return _page(base, f"experiments/{experiment_id}/runs")


def home_page(base: str) -> str:
    """The experiments of a server."""
    return _page(base, "experiments")


def run_page(base: str, experiment_id: str, run_id: str, tab: str = "") -> str:
    """A run, or a part of its page: `model-metrics`, `artifacts`, `artifacts/FILE`."""
    return _page(base, f"experiments/{experiment_id}/runs/{run_id}{'/' if tab else ''}{tab}")


def model_page(base: str, experiment_id: str, model_id: str) -> str:
    """A checkpoint (a LoggedModel)."""
    return _page(base, f"experiments/{experiment_id}/models/{model_id}")


def version_page(base: str, name: str, version: str) -> str:
    """A version of a registered model."""
    return _page(base, f"models/{quote(name, safe='')}/versions/{version}")


def chart_page(base: str, experiment_id: str, run_id: str, metrics: Sequence[str]) -> str:
    """Several metrics of a run by step, in one chart."""
    asked = {
        "runs": json.dumps([run_id]),
        "experiments": json.dumps([experiment_id]),
        "metric": json.dumps(metrics[0]),
        "plot_metric_keys": json.dumps(list(metrics)),
        "x_axis": "step",
    }
    return f"{base}/#/metric?{urlencode(asked | MODE)}"


def _page(base: str, path: str) -> str:
    return f"{base}/#/{path}?{urlencode(MODE)}"


def remember_pages(home: Path, run: str, pages: dict[str, str]) -> None:
    """Keep addresses within MLflow's pages that belong to a run, for commands that do not ask MLflow.

    Args:
        home: `$MOPD_HOME`.
        run: The run's name.
        pages: `run`, `champion` or `lineage` -> address; those that are not named stay.
    """
    path = _kept(home, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known_pages(home, run) | pages, indent=1))


def known_pages(home: Path, run: str) -> dict[str, str]:
    """What `remember_pages` kept; empty where that is nothing, or cannot be read: the next run writes it anew."""
    try:
        kept = json.loads(_kept(home, run).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(name): str(page) for name, page in kept.items()} if isinstance(kept, dict) else {}


def page_lines(base: str, home: Path, run: str) -> list[str]:
    """A line for each page of a run that MLflow's server at `base` shows."""
    known = known_pages(home, run)
    return [f"  {name + ':':9} {base}{known[name]}" for name in ("run", "champion", "lineage") if name in known]


def _kept(home: Path, run: str) -> Path:
    return home / "runs" / run / "mlflow.json"
