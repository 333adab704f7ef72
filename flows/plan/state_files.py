"""Reads the small files of a home, which a full disk, a crash or manual edits may have damaged. Free of torch.

The message of a damaged file names the file and the remedy.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from base.documents import DocumentError, read_object, user_error

LOCK_FILE = "lock.json"
CHAMPION_FILE = "champion.json"
TRIES_FILE = "tries.json"
MEND = "move it away; it is written anew when it is needed"
MENDS = {
    LOCK_FILE: "move it away, and the next `mopd run` writes it anew with new pins: the champion a run starts "
    "from, Hub revisions, the date",
    CHAMPION_FILE: "move it away, and `mopd promote FILE --reason WHY` names a champion again; the checkpoints are in "
    "the store",
    TRIES_FILE: "move it away, and the gate counts its tries on the held-out examples from one again",
}


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class _LockedNode(_Loose):
    key: str
    stage: str
    parents: dict[str, str] = Field(default_factory=dict)


class _Lock(_Loose):
    pins: dict[str, str] = Field(default_factory=dict)
    nodes: dict[str, _LockedNode] = Field(default_factory=dict)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    student: str
    node: str
    scores: dict[str, str]
    when: str
    by: Literal["gate", "person"]
    reason: str
    action: Literal["promote", "rollback"] = "promote"
    against: list[str] = Field(default_factory=list)


class _History(_Loose):
    history: list[_Entry]


class _Try(BaseModel):
    model_config = ConfigDict(extra="forbid")

    student: str
    examples: dict[str, str]


class _Tries(_Loose):
    tries: list[_Try]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file.

    Raises:
        UserError: the file is damaged; the message names it and the remedy.
    """
    mend = MENDS.get(path.name, MEND)
    try:
        found = read_object(path)
    except FileNotFoundError:
        return {}
    except DocumentError as error:
        raise user_error(path, error, mend) from None
    try:
        if path.name == LOCK_FILE:
            _Lock.model_validate(found)
        elif path.name == CHAMPION_FILE:
            _History.model_validate(found)
        elif path.name == TRIES_FILE:
            _Tries.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise user_error(path, DocumentError(f"{key}: {first['msg']}"), mend) from None
    return found
