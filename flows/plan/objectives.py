"""The content of a user's own objective, as an ingredient of content keys. Free of torch."""

import ast
from pathlib import Path

from base.errors import UserError, nearest
from base.store.checkpoint import hash_file
from base.user_code import require_file
from stages.config.objective import Objective, PythonObjective

KEY = "merge.objective.path"


def objective_facts(objective: Objective) -> dict[str, str]:
    """The ingredient of a user's own file; empty for other types. The file is read, not run: it imports torch.

    Raises:
        UserError: there is no such file or function, the file is no Python, or the function has no such option.
    """
    if not isinstance(objective, PythonObjective):
        return {}
    file = Path(objective.file)
    require_file(KEY, file)
    try:
        body = ast.parse(file.read_bytes(), str(file)).body
    except (SyntaxError, ValueError) as error:
        line = f" line {error.lineno}:" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{KEY}: {file}:{line} not Python: {error}") from None
    functions = {each.name: each for each in body if isinstance(each, ast.FunctionDef)}
    if objective.function not in functions:
        raise UserError(f"{KEY}: {file}: no function '{objective.function}'{nearest(objective.function, functions)}")
    _check_options(objective, functions[objective.function].args)
    return {"objective": hash_file(file)}


def _check_options(objective: PythonObjective, arguments: ast.arguments) -> None:
    """Check the options against the function's keyword arguments, which follow its three tensors."""
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    known = [*positional[3:], *(each.arg for each in arguments.kwonlyargs)]
    if len(positional) < 3 and arguments.vararg is None:
        raise UserError(
            f"{KEY}: {objective.path}: takes {len(positional)} positional arguments; it gets three tensors: the "
            f"student's logits, the target's logits, the sampled tokens"
        )
    unknown = next((name for name in objective.options if name not in known), None)
    if unknown is not None and arguments.kwarg is None:
        raise UserError(
            f"merge.objective.options.{unknown}: no keyword of {objective.function}{nearest(unknown, known)}"
        )
