"""Imports a user's own Python file; errors in it name the key, the file and the line."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from base.errors import UserError, nearest
from base.hashing import stable_hash

SUFFIX = ".py"


@contextmanager
def calling(key: str, file: Path, what: str) -> Iterator[None]:
    """Turn any error or exit of a user's code into a UserError that names file, line and call."""
    try:
        yield
    except (UserError, ConnectionError):
        raise
    except (Exception, SystemExit) as error:
        own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        place = f"{file}: line {own[-1]}" if own else str(file)
        raise UserError(f"{key}: {place}: {what}: {type(error).__name__}: {error}") from error


def require_file(key: str, file: Path) -> None:
    """Check that a user's file exists.

    Raises:
        UserError: it does not; the message names the nearest Python file in its folder.
    """
    if not file.is_file():
        siblings = [str(path) for path in file.parent.glob(f"*{SUFFIX}")] if file.parent.is_dir() else []
        raise UserError(f"{key}: {file}: no such file{nearest(str(file), siblings)}")


def import_file(key: str, file: Path, check: Callable[[Any], None]) -> Any:
    """Import a user's file under a unique name, once per process.

    Args:
        key: The key that names the file, for messages.
        file: The Python file.
        check: Called with the module before it is kept; raises a UserError if a part is missing.

    Raises:
        UserError: the file does not exist, raises or ends the process, or `check` refuses it.
    """
    require_file(key, file)
    known = f"own_{stable_hash(str(file.resolve()))[:16]}"
    if known in sys.modules:
        check(sys.modules[known])
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        with calling(key, file, "import"):
            spec.loader.exec_module(module)
        check(module)
    except UserError:
        del sys.modules[known]
        raise
    return module
