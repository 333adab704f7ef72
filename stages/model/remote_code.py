"""Python code that a checkpoint brings: run only where the run file says `remote_code: true`. Free of torch.

Every place that reads a model's config, weights or tokenizer passes `options()`, so the answer is given once a process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OWN_CODE = "it brings code of its own; read it, and if you trust it say `remote_code: true` in the run file"
# Of the process and all its threads: teachers are read in one of their own.
_allowed = [False]


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Let checkpoints run the code they bring, or not, in what follows."""
    _allowed.append(allowed)
    try:
        yield
    finally:
        _allowed.pop()


def options() -> dict[str, Any]:
    """Arguments for transformers' `from_pretrained` and `from_config`."""
    return {"trust_remote_code": _allowed[-1]}
