"""Arguments that the commands share, and the error messages of their mistakes."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from base.errors import UserError

RunFile = Annotated[Path, typer.Argument(help="A run file, such as flows/runs/lab.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted assignments: experts.sort.train.rl.max_steps=50", show_default=False)
]
Home = Annotated[Path, typer.Option("--home", envvar="MOPD_HOME", help="Where everything is kept.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", min=1, help="Cap on the steps of every stage.")]
AsWritten = Annotated[
    bool, typer.Option("--as-written", help="Use the file alone, without the overrides of its last run.")
]
IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Only warn of stages that are estimated not to fit into memory.")
]
Full = Annotated[bool, typer.Option("--full", help="All tables, statements and criteria, too.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_HOME = Path(".mopd")
# A file in place of a folder, or the reverse; circular links; a name that no file system accepts.
NO_SUCH_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn errors into one message and an exit code: 2 for a mistake or an unwritable place, 1 for a full disk."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        raise typer.Exit(130) from None
    except UserError as error:
        _fail(str(error), 2)
    except ConnectionError as error:
        _fail(str(error), 1)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"the disk is full{place}; free some space and run again: finished work is kept", 1)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
            _fail(f"{error.filename}: {error.strerror}; make it writable or choose another --home", 2)
        if error.errno in NO_SUCH_PLACE and error.filename:
            _fail(
                f"{error.filename}: {error.strerror}; move the existing file or folder away, or choose another place", 2
            )
        raise


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)
