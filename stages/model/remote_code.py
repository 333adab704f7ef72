"""Permission to run a checkpoint's own Python code: only with `remote_code: true` in the run file. Free of torch.

All code that loads a model's config, weights or tokenizer passes `options()`, so the permission is set once per
process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OWN_CODE = "it contains code of its own; read it, and if you trust it set `remote_code: true` in the run file"
# Shared by all threads, because teachers are loaded in another thread.
_allowed = [False]


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """A context in which checkpoints may run their own code, or may not."""
    _allowed.append(allowed)
    try:
        yield
    finally:
        _allowed.pop()


def options() -> dict[str, Any]:
    """Arguments for transformers' `from_pretrained` and `from_config`."""
    return {"trust_remote_code": _allowed[-1]}
