"""The command that writes a first run file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import DEFAULT_HOME, Home, errors_as_messages

BASE = "Base: tiny (pretrained here), a folder, a .gguf file or a Hugging Face id"
DOMAIN = "Domain NAME=DATA, such as maths=data/maths.jsonl or spelling=reasoning:spell_backward (empty: no more)"


def add_to(app: typer.Typer) -> None:
    """Declare the command."""
    app.command("init")(init)


def init(
    file: Annotated[Path, typer.Argument(help="The run file to write; its stem names the run.")] = Path("run.yaml"),
    base: Annotated[
        str | None, typer.Option("--base", help="tiny (pretrained here), a folder, a .gguf file or a Hugging Face id.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            help="NAME=DATA, once for each: a data file, folder or Hub id, strings:TASK, reasoning:TASK, code_edit, or "
            "a Python file.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME.KEY=VALUE, an option of a domain: maths.scorer=numeric.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, help="Devices of each stage; one where there is one, by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a small, commented run file from a base and a few domains, and check it; asks for missing arguments."""
    from base.errors import UserError
    from flows.cli import runs as commands
    from flows.run.run_request import RunRequest
    from flows.scaffold.init import init as write

    with errors_as_messages():
        if (base is None or not domain) and not _is_terminal():
            raise UserError("--base and at least one --domain are required without a terminal")
        base = base or str(typer.prompt(BASE, default="tiny"))
        domains = list(domain or _ask_domains())
        for line in write(file, base, domains, option or (), gpus=_gpus() if gpus is None else gpus, force=force):
            sys.stdout.write(f"{line}\n")
        sys.stdout.write(f"{file} is written. Its plan:\n")
        commands.plan(RunRequest(file, (), None, home), check=True, as_json=False)
        sys.stdout.write(f"Now: mopd run {file}\n")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _ask_domains() -> list[str]:
    found: list[str] = []
    while True:
        answer = str(typer.prompt(DOMAIN, default="", show_default=False)).strip()
        if answer:
            found.append(answer)
        elif found:
            return found


def _gpus() -> int:
    from flows.engines.devices import host_devices

    return min(1, len(host_devices()))
