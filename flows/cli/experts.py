"""The commands that add or remove an expert, and update a run's pins."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_HOME, Home, Overrides, RunFile, errors_as_messages

ExpertName = Annotated[str, typer.Argument(metavar="NAME", help="The expert.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command("add-expert")(add_expert)
    app.command("remove-expert")(remove_expert)
    app.command()(repin)


def add_expert(
    file: RunFile,
    name: ExpertName,
    domain: Annotated[
        str | None, typer.Option("--domain", help="A domain of the run file, or the kind of a new one: reasoning, …")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Task of a reasoning or strings domain.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", help="KEY=VALUE for the new domain.")] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="rl, sft or rft; by default as the expert whose settings are copied.")
    ] = None,
    like: Annotated[str | None, typer.Option("--like", help="Expert whose settings are copied.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, training settings that differ.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="An expert trained elsewhere: a directory or a Hub id.")
    ] = None,
    module: Annotated[
        Path | None,
        typer.Option("--module", help="A domain of your own in this file; a template is written if it is new."),
    ] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write an expert, and its domain if it is new, into a run file; `mopd run` then trains it and merges again."""
    from flows.scaffold import add_expert as work

    with errors_as_messages():
        asked = work.NewExpert(name, domain, task or (), option or (), train, like, set_ or (), checkpoint, module)
        _print(work.add_expert(file, asked, home))


def remove_expert(
    file: RunFile,
    name: ExpertName,
    with_domain: Annotated[bool, typer.Option("--with-domain", help="Remove its domain too.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Remove an expert from a run file; its checkpoint stays in the store and its lineage readable."""
    from flows.scaffold import add_expert as work

    with errors_as_messages():
        _print(work.remove_expert(file, name, home, with_domain=with_domain))


def repin(file: RunFile, overrides: Overrides = None, home: Home = DEFAULT_HOME) -> None:
    """Pin the run's mutable names (`champion`, a Hub branch) to their present targets."""
    from flows.champion.repin import repin as move
    from flows.run_file.load import load_run_file

    with errors_as_messages():
        move(load_run_file(file, list(overrides or ())), home)


def _print(lines: list[str]) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
