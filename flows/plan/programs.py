"""What of a user's own program is part of a content key. Free of torch."""

import os
from pathlib import Path
from typing import Any

from base.errors import UserError, nearest
from stages.config.command import CommandConfig


def program_facts(key: str, own: CommandConfig) -> dict[str, Any]:
    """The hashed values of a program: its settings, the contents of its files, and its variables.

    Args:
        key: The program's key in the run file, for messages.
        own: The program.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        contents = own.contents()
    except OSError as error:
        path = Path(error.filename or own.files[0])
        near = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{key}.files: {path}: {error.strerror}{nearest(str(path), near)}") from None
    return {"config": own.key_fields(), "files": contents, "environment": own.variables(os.environ)}
