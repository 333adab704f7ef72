"""The objective in a user's own Python file: `objective: {type: python, path: FILE.py:FUNCTION}`.

Shape suffixes: C tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import UserError, nearest
from base.store.checkpoint import hash_file
from base.user_code import calling, import_file
from stages.config.objective import PythonObjective

KEY = "merge.objective.path"
OwnObjective = Callable[[Tensor, Tensor, Tensor], Tensor]


def load_objective(objective: PythonObjective) -> OwnObjective:
    """The function of a user's file, with its options; each of its results is checked.

    Returns:
        A function of the student's logits [C, V], the target's logits [C, V] and the sampled tokens [C] that gives each
        token's loss [C], in nats. Both logits are divided by the temperature. The gradient flows through the student's.

    Raises:
        UserError: the file cannot be imported, or has no such function.
    """
    file, name = Path(objective.file), objective.function

    def check(module: Any) -> None:
        if not callable(getattr(module, name, None)):
            functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
            raise UserError(f"{KEY}: {file}: no function '{name}'{nearest(name, functions)}")

    function = getattr(import_file(KEY, file, check), name)

    def losses(logits_CV: Tensor, target_CV: Tensor, tokens_C: Tensor) -> Tensor:
        with calling(KEY, file, name):
            losses_C = function(logits_CV, target_CV, tokens_C, **objective.options)
        if fault := _fault(losses_C, logits_CV):
            raise UserError(f"{KEY}: {file}: {name} gives {fault}; it has to return a loss for each token")
        return torch.as_tensor(losses_C)

    return losses


def require_unchanged(objective: PythonObjective, ingredients: Mapping[str, Any]) -> None:
    """Check that a user's file is the one that the plan hashed into the content key.

    Raises:
        UserError: it was edited after the plan.
    """
    planned = ingredients.get("objective")
    if planned is not None and planned != hash_file(Path(objective.file)):
        raise UserError(f"{KEY}: {objective.file}: edited since the run was planned; start the run again")


def _fault(losses_C: Any, logits_CV: Tensor) -> str:
    """The reason why a result is no loss of each token; empty if it is one."""
    if not isinstance(losses_C, Tensor):
        return f"{losses_C!r:.60} ({type(losses_C).__name__})"
    if losses_C.shape != logits_CV.shape[:1]:
        return f"a tensor of shape {list(losses_C.shape)} for {len(logits_CV)} tokens"
    if not losses_C.is_floating_point():
        return f"a tensor of {losses_C.dtype}"
    if logits_CV.requires_grad and not losses_C.requires_grad:
        return "a tensor without a gradient to the student's logits"
    return "" if bool(losses_C.detach().isfinite().all()) else "a loss that is not finite"
