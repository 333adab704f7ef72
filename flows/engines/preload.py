"""Imports torch, transformers and peft without the packages that they take in only because these are installed.

transformers imports SciPy and scikit-learn for losses of object detection and for assisted generation, and peft imports
bitsandbytes, which brings torch's compiler. No stage uses these parts, and they take two fifths of the time in which a
process starts.
"""

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence

from stages.config.kinds import STAGES

LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "accelerate",
    "tokenizers",
)
PRELOAD = (*LIBRARIES, *dict.fromkeys(kind.run.split(":")[0] for kind in STAGES.values() if kind.preload))
HIDDEN = ("bitsandbytes", "scipy", "sklearn")
# Modules whose functions keep the answer whether a package is installed.
_ANSWERS = ("transformers.utils.import_utils", "peft.import_utils", "accelerate.utils.imports")
_log = logging.getLogger("flows.engines.preload")


def preload(modules: Sequence[str]) -> None:
    """Import modules; those of `LIBRARIES` without the packages in `HIDDEN`. One that cannot be imported is logged."""
    for name in modules:
        try:
            with _hidden() if name in LIBRARIES else contextlib.nullcontext():
                importlib.import_module(name)
        except ImportError as error:
            # A job that needs the module fails with this error; the others can run.
            _log.warning("cannot preload %s: %s", name, error)


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    """Let the packages in `HIDDEN` look as if they were not installed; afterwards they can be imported."""
    hidden = [name for name in HIDDEN if name not in sys.modules]
    # Python finds no package under a name that stands for None.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        for module in filter(None, map(sys.modules.get, _ANSWERS)):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
