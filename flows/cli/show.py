"""Prints the outcome of a run, as text or as JSON, and where to find more."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from base.store.checkpoint import Store
from flows.plan.champion_start import savings
from flows.plan.nodes import StageGraph

if TYPE_CHECKING:
    from flows.run.finish import Outcome


@dataclass(frozen=True)
class Shown:
    """How the outcome of a run is shown.

    Attributes:
        full: Also all tables, statements and criteria.
        as_json: JSON instead of text.
    """

    full: bool = False
    as_json: bool = False


TEXT = Shown()


def show_outcome(graph: StageGraph, outcome: "Outcome", home: Path, console: Console, shown: Shown = TEXT) -> None:
    """Print the candidate's score, the gate's decision, suggestions, and where to find more.

    Args:
        graph: The run.
        outcome: Its outcome.
        home: `$MOPD_HOME`.
        console: The console to print on.
        shown: The form.
    """
    from evals.report.summary import WIDTH, render

    if shown.as_json:
        from pydantic_core import to_json

        facts = to_json(outcome.facts(), indent=1, inf_nan_mode="null").decode()
        sys.stdout.write(facts + "\n")
        return
    if shown.full:
        from evals.report.table import render as render_tables

        console.print(render_tables(outcome.results, console.width))
        for line in outcome.verdict_lines():
            console.print(line, markup=False, highlight=False)
        console.print()
    for text in render(outcome.summary, min(WIDTH, console.width)):
        console.print(text, highlight=False)
    places = [*savings(graph, Store(home)), f"Report: {outcome.report}", *pages(home, graph.config.name)]
    for line in [*places, *([] if shown.full else ["All tables and criteria: --full"])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def pages(home: Path, run: str) -> list[str]:
    """The addresses of MLflow's and Prefect's pages, and the command that serves those without a standing server."""
    from flows.servers.pages import home_page, page_lines
    from flows.servers.standing import standing
    from flows.servers.start import without_secrets

    tracking, api = os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("PREFECT_API_URL", "")
    # Only a server's address is a page, a database is not.
    places = {
        "MLflow": tracking if tracking.startswith("http") else standing(home, "mlflow"),
        "Prefect": api.rstrip("/").removesuffix("/api") or standing(home, "prefect"),
    }
    lines = [f"{name + ':':8} {without_secrets(place)}" for name, place in places.items() if place]
    if tracked := without_secrets(places["MLflow"]).rstrip("/"):
        lines[:1] = [f"MLflow:  {home_page(tracked)}", *page_lines(tracked, home, run)]
    missing = " and ".join(f"{name}'s" for name, place in places.items() if not place)
    return [*lines, f"{missing} pages: mopd ui --home {home}"] if missing else lines
