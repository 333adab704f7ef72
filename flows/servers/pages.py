"""URLs of MLflow's pages. `base` is the server's URL, or empty for a link within the pages.

By default MLflow opens in a mode for language-model applications, whose side bar has no models. The query selects the
mode for training. It has to follow the fragment, because the pages' router reads it there. Free of mlflow.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from base.store.checkpoint import write_whole

MODE = {"workflowType": "machine_learning"}


def home_page(base: str) -> str:
    """The page with the experiments of a server."""
    return _page(base, "experiments")


def run_page(base: str, experiment_id: str, run_id: str, tab: str = "") -> str:
    """The page of a run, or a tab of it: `model-metrics`, `artifacts`, `artifacts/FILE`."""
    return _page(base, f"experiments/{experiment_id}/runs/{run_id}{'/' if tab else ''}{tab}")


def model_page(experiment_id: str, model_id: str) -> str:
    """The page of a checkpoint (a LoggedModel), relative to the server."""
    return _page("", f"experiments/{experiment_id}/models/{model_id}")


def version_page(base: str, name: str, version: str) -> str:
    """The page of a version of a registered model."""
    return _page(base, f"models/{quote(name, safe='')}/versions/{version}")


def chart_page(experiment_id: str, run_id: str, metrics: Sequence[str]) -> str:
    """The page with several metrics of a run by step, in one chart, relative to the server."""
    query = {
        "runs": json.dumps([run_id]),
        "experiments": json.dumps([experiment_id]),
        "metric": json.dumps(metrics[0]),
        "plot_metric_keys": json.dumps(list(metrics)),
        "x_axis": "step",
    }
    return f"/#/metric?{urlencode(query | MODE)}"


def _page(base: str, path: str) -> str:
    return f"{base}/#/{path}?{urlencode(MODE)}"


def save_pages(home: Path, run: str, pages: dict[str, str]) -> None:
    """Save addresses of a run's MLflow pages, for commands that do not connect to MLflow.

    Args:
        home: `$MOPD_HOME`.
        run: The run's name.
        pages: `run`, `champion` or `lineage` -> address. Saved pages that are not among them are kept.
    """
    path = _file(home, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(saved_pages(home, run) | pages, indent=1))


def saved_pages(home: Path, run: str) -> dict[str, str]:
    """The pages saved by `save_pages`. Empty if there are none or the file is damaged: the next run rewrites it."""
    try:
        kept = json.loads(_file(home, run).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(name): str(page) for name, page in kept.items()} if isinstance(kept, dict) else {}


def page_lines(base: str, home: Path, run: str) -> list[str]:
    """A line for each saved page of a run, with URLs of MLflow's server at `base`."""
    saved = saved_pages(home, run)
    return [f"  {name + ':':9} {base}{saved[name]}" for name in ("run", "champion", "lineage") if name in saved]


def _file(home: Path, run: str) -> Path:
    return home / "runs" / run / "mlflow.json"
