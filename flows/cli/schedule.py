"""The commands that schedule a run and execute scheduled runs."""

import sys
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_HOME, Home, MaxSteps, Overrides, RunFile, errors_as_messages
from flows.run.run_request import RunRequest

Pool = Annotated[str, typer.Option("--pool", help="Prefect work pool; created with type process if it is missing.")]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command()(deploy)
    app.command()(worker)


def deploy(
    file: RunFile,
    overrides: Overrides = None,
    cron: Annotated[
        str | None, typer.Option("--cron", help="'0 2 * * 1' is Mondays at two; none: started by hand.")
    ] = None,
    timezone: Annotated[str, typer.Option("--timezone", help="Time zone of the schedule: Europe/Berlin, …")] = "UTC",
    paused: Annotated[bool, typer.Option("--paused", help="The schedule is inactive until it is started.")] = False,
    pool: Pool = "mopd",
    remove: Annotated[bool, typer.Option("--remove", help="Remove the deployment instead.")] = False,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
) -> None:
    """Put a run on a schedule in Prefect; the standing server is `mopd ui`, or the one of PREFECT_API_URL."""
    with errors_as_messages():
        from flows.run import deploy as work

        asked = RunRequest(file, tuple(overrides or ()), max_steps, home)
        if remove:
            lines = work.retire(asked.graph().config, home)
        else:
            lines = work.deploy(asked, work.Plan(cron, timezone, paused, pool))
        sys.stdout.write("".join(f"{line}\n" for line in lines))


def worker(
    pool: Pool = "mopd",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Runs at one time; no limit by default.")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Execute the scheduled runs of a pool until Ctrl-C."""
    with errors_as_messages():
        from flows.run.deploy import work

        work(home, pool, limit)
