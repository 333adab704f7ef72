"""Import reasoning-gym with or without pycosat.

pip has pycosat only as source, so installing it needs a C compiler and Python's headers. reasoning-gym imports it at
once, but uses it for one task. Set-up leaves it out; that task is refused by name unless pycosat is installed.
"""

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

# The tasks that call pycosat, in reasoning-gym 0.1.25.
PYCOSAT_TASKS = frozenset({"zebra_puzzles"})


def has_pycosat() -> bool:
    """Whether the optional solver is installed."""
    return importlib.util.find_spec("pycosat") is not None


def import_reasoning_gym() -> ModuleType:
    """Import reasoning-gym; without pycosat only `PYCOSAT_TASKS` fail, when they draw an example.

    Every import of reasoning-gym or of a module below it goes through here first.

    Raises:
        ImportError: reasoning-gym is not installed.
    """
    if "reasoning_gym" in sys.modules or has_pycosat():
        return importlib.import_module("reasoning_gym")
    stand_in = ModuleType("pycosat")
    stand_in.itersolve = _itersolve  # type: ignore[attr-defined]
    sys.modules["pycosat"] = stand_in
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        # Other libraries that look for pycosat must find it absent.
        del sys.modules["pycosat"]


def _itersolve(clauses: Iterable[Iterable[int]]) -> Iterator[list[int]]:
    raise ImportError("this reasoning-gym task needs pycosat; `pip install pycosat` builds it with a C compiler")
