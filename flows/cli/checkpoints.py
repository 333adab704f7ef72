"""The commands that read the store: a checkpoint's lineage, differences between two, export, and garbage collection."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from base.errors import UserError, nearest
from base.store.checkpoint import Store
from flows.cli import store as store_commands
from flows.cli.options import DEFAULT_HOME, Home, errors_as_messages

FORMATS = ("text", "mermaid", "json", "html")
Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A run, a node (lab:experts/sort), a run's champion (lab:champion), or a content key.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Declare the commands."""
    app.command()(lineage)
    app.command()(diff)
    app.command()(export)
    app.command()(gc)


def lineage(
    name: Reference,
    home: Home = DEFAULT_HOME,
    format_: Annotated[str, typer.Option("--format", help="text, mermaid, json or html.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Draw it into this file instead.")] = None,
) -> None:
    """Print how a checkpoint was made: its teachers, their data, the base."""
    with errors_as_messages():
        if format_ not in FORMATS:
            raise UserError(f"--format: '{format_}' is not one of {', '.join(FORMATS)}{nearest(format_, FORMATS)}")
        store_commands.lineage(name, home, form="json" if as_json else format_, html=html)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, named as for lineage.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    home: Home = DEFAULT_HOME,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the differences between two checkpoints: settings, data, code, parents, scores."""
    with errors_as_messages():
        store_commands.diff(a, b, home, as_json=as_json)


def export(
    name: Reference,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.", show_default=False)],
    home: Home = DEFAULT_HOME,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    push: Annotated[str | None, typer.Option("--push", help="Also to this Hub repository, OWNER/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    code: Annotated[bool, typer.Option("--remote-code", help="Allow the Python code that comes with it.")] = False,
) -> None:
    """Write a checkpoint for other programs: adapters merged, safetensors, tokenizer, a model card with its lineage."""
    with errors_as_messages():
        from flows.lineage.export import export as work

        for line in work(Store(home), name, folder, dtype=dtype, push=push, public=public, remote_code=code):
            sys.stdout.write(f"{line}\n")


def gc(
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; otherwise it is only shown.")] = False,
    days: Annotated[float, typer.Option("--older-than", min=0, help="Days; anything younger is kept.")] = 0.0,
    corrupted: Annotated[bool, typer.Option("--corrupted", help="Also artifacts set aside as corrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show artifacts that no run plans and no registered student descends from; with --yes, remove them."""
    with errors_as_messages():
        store_commands.gc(home, yes=yes, days=days, corrupted=corrupted, as_json=as_json)
