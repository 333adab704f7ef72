"""`mopd`: from a run file to one merged student.

Imports prefect, mlflow and torch only when a command needs them, so that `mopd plan` and `--help` respond at once.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from base.errors import UserError
from base.store.checkpoint import Store
from flows.cli import checkpoints as cli_checkpoints
from flows.cli import experts as cli_experts
from flows.cli import init as cli_init
from flows.cli import runs as commands
from flows.cli import schedule as cli_schedule
from flows.cli.options import (
    DEFAULT_HOME,
    AsJson,
    AsWritten,
    Full,
    Home,
    IgnoreMemory,
    MaxSteps,
    Overrides,
    RunFile,
    errors_as_messages,
)
from flows.cli.show import Shown
from flows.run.run_request import RunRequest

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 a stage failed or something is not ready, 2 a mistake in the command or run file, "
    "3 finished but not promoted (`run --require-promotion` only), 130 stopped from outside. "
    "Everything finished is kept in any case; the same command resumes.",
)
serve = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run vLLM servers for a run's merge until Ctrl-C; a run without `urls` of its own starts them itself.",
)
app.add_typer(serve, name="serve")

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[
    int | None, typer.Option("--port", min=1, max=65535, help="The first server's port; the others' follow.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Which seed's merge; the run's first by default.")]


def _show_schema(value: bool) -> None:
    if value:
        commands.show_schema(Console())
        raise typer.Exit


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"mopd {version('mopd')}\n")
        raise typer.Exit


@app.callback()
def mopd(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """From one base checkpoint to one merged student: SFT cold start, per-domain experts, MOPD."""
    del show_version


@app.command()
def run(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    ignore_memory: IgnoreMemory = False,
    discard_corrupted: Annotated[
        bool, typer.Option("--discard-corrupted", help="Set corrupted artifacts aside and make them anew.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain progress lines, no live display.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's own log as well.")] = False,
    require_promotion: Annotated[
        bool, typer.Option("--require-promotion", help="Exit code 3 unless the candidate is champion at the end.")
    ] = False,
    full: Full = False,
    as_json: AsJson = False,
    help_config: Annotated[
        bool,
        typer.Option("--help-config", is_eager=True, callback=_show_schema, help="Show every key of a run file."),
    ] = False,
) -> None:
    """Make what is missing, merge, compare and report. Run again after a failure or Ctrl-C: it resumes."""
    del help_config
    with errors_as_messages():
        asked = RunRequest(file, tuple(overrides or ()), max_steps, home, ignore_memory)
        code = commands.run(
            asked,
            discard_corrupted=discard_corrupted,
            plain=plain,
            verbose=verbose,
            require_promotion=require_promotion,
            shown=Shown(full, as_json),
        )
    raise typer.Exit(code)


@app.command()
def plan(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also draw the data, compare tokenizers and look at the disk.")
    ] = False,
    ignore_memory: IgnoreMemory = False,
    as_written: AsWritten = False,
    as_json: AsJson = False,
) -> None:
    """Show what is cached, what would run, and why: of the file's last run, unless overrides are given.

    Starts nothing.
    """
    with errors_as_messages():
        asked = RunRequest.last(file, tuple(overrides or ()), max_steps, home, as_written)
        commands.plan(asked, check=check, as_json=as_json, ignore_memory=ignore_memory)


@app.command()
def status(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    as_written: AsWritten = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of each node of the file's last run: done, its current step, or the reason of its end."""
    with errors_as_messages():
        asked = RunRequest.last(file, tuple(overrides or ()), max_steps, home, as_written)
        commands.status(asked, as_json=as_json)


@app.command()
def report(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    as_written: AsWritten = False,
    full: Full = False,
    as_json: AsJson = False,
    page: Annotated[Path | None, typer.Option("--page", help="claims: where its page goes; docs/claims.md.")] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            help="claims: judge the measurements in this JSON file, not the home's scores.",
        ),
    ] = None,
) -> None:
    """Compare what is finished of the file's last run and write the HTML report; trains nothing.

    Given a folder, or the word `claims` for flows/runs/claims: test the hypotheses of its run files on one page.
    """
    with errors_as_messages():
        if file.is_dir() or str(file) == "claims":
            from flows.cli import claims

            folder = claims.FOLDER if str(file) == "claims" else file
            written = claims.write_claims(folder, overrides or [], home, page, measured)
            sys.stdout.write(f"{written}\n")
            return
        asked = RunRequest.last(file, tuple(overrides or ()), max_steps, home, as_written)
        commands.report(asked, Shown(full, as_json))


@app.command()
def promote(
    file: RunFile,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the champion's history.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE] [OVERRIDES]...",
            help="A merge of the run, such as baselines/ties (the gate's candidate by default), or a former champion's "
            "key; and dotted assignments.",
            show_default=False,
        ),
    ] = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
) -> None:
    """Make a merge of a run its champion, regardless of the gate; a new candidate may still replace it."""
    from flows.champion import champion

    with errors_as_messages():
        overrides = tuple(word for word in words or () if "=" in word)
        names = [word for word in words or () if "=" not in word]
        if len(names) > 1:
            raise UserError(f"name one merge, not {len(names)}: {', '.join(names)}")
        asked = RunRequest.last(file, overrides, max_steps, home)
        champion.promote(asked.graph(), Store(home), next(iter(names), None), reason)


@app.command()
def rollback(file: RunFile, overrides: Overrides = None, home: Home = DEFAULT_HOME, max_steps: MaxSteps = None) -> None:
    """Restore the previous champion; the gate does not promote again a checkpoint that was rolled back."""
    from flows.champion import champion

    with errors_as_messages():
        asked = RunRequest.last(file, tuple(overrides or ()), max_steps, home)
        champion.rollback(asked.graph(), Store(home))


@app.command()
def ui(
    home: Home = DEFAULT_HOME,
    host: Host = "127.0.0.1",
    mlflow_port: Annotated[int | None, typer.Option("--mlflow-port", help="MLflow's port.")] = None,
    prefect_port: Annotated[int | None, typer.Option("--prefect-port", help="Prefect's port.")] = None,
) -> None:
    """Serve MLflow's and Prefect's pages until Ctrl-C."""
    from flows.servers import standing

    with errors_as_messages():
        standing.ui(home, host, mlflow_port, prefect_port)


@serve.command("rollout")
def serve_rollout(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many servers.")] = None,
    seed: Seed = None,
) -> None:
    """Serve the merge's rollouts; a stage sends the servers its student's weights."""
    from flows.cli.serve import Place, rollout

    with errors_as_messages():
        asked = RunRequest(file, tuple(overrides or ()), max_steps, home)
        rollout(asked, Place(host, port), count=count, seed=seed)


@serve.command("teachers")
def serve_teachers(
    file: RunFile,
    overrides: Overrides = None,
    home: Home = DEFAULT_HOME,
    max_steps: MaxSteps = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    seed: Seed = None,
) -> None:
    """Serve the merge's teachers, which must exist already; adapters of one base share a server."""
    from flows.cli.serve import Place, teachers

    with errors_as_messages():
        asked = RunRequest(file, tuple(overrides or ()), max_steps, home)
        teachers(asked, Place(host, port), seed=seed)


@app.command()
def doctor(
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Annotated[bool, typer.Option("--threads", help="Also time a training step by threads.")] = False,
) -> None:
    """Show versions, devices, servers, stores, and whether a run can start. 1 if not."""
    from flows.cli.doctor import examine

    with errors_as_messages():
        healthy = examine(home, Console(), as_json=as_json, threads=threads)
    raise typer.Exit(0 if healthy else 1)


cli_init.add_to(app)
cli_experts.add_to(app)
cli_checkpoints.add_to(app)
cli_schedule.add_to(app)
