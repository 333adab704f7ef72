"""lm-evaluation-harness tasks in the graph: their contributions to content keys, and their checks.

Planning reads only the user's own task files; the deep check indexes the harness's thousands of tasks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError, nearest
from base.extras import harness_version
from evals.measure.harness_tasks import KEY, TaskIndex, index_tasks, own_tasks, task_fingerprint
from flows.run_file.schema import RunConfig
from stages.config.harness import HarnessTaskConfig

if TYPE_CHECKING:
    from flows.plan.nodes import Node


def harness_tasks(run: RunConfig) -> list[tuple[HarnessTaskConfig, dict[str, Any]]]:
    """The tasks of a run file.

    Returns:
        For each task its config, and the ingredients of its nodes' content keys: that config, the harness's version,
        and the hash of the task's files if it is the user's own.

    Raises:
        UserError: the harness is not installed, include_path is not a directory, a task's file is missing, or a domain
            of the run has a task's name.
    """
    config = run.evaluate.harness
    if config is None:
        return []
    if taken := next((name for name in run.evaluate.harness_domains if name in run.domains), None):
        raise UserError(f"domains.{taken}: {KEY} has a task of this name; choose another name")
    version = harness_version(KEY)
    local = _local_tasks(config.include_path)
    tasks = []
    for name in config.tasks:
        file = local.tasks.get(name)
        if file is None and (group := local.groups.get(name)):
            raise UserError(f"{KEY}.tasks: {group}: {name} is a group; name its tasks")
        own = HarnessTaskConfig.of(config, name, str(file) if file else None, run.evaluate)
        content = task_fingerprint(file) if file else None
        tasks.append((own, {"config": own.key_fields(), "harness": version, "task": content}))
    return tasks


def harness_problems(run: RunConfig, missing: Sequence["Node"]) -> Iterator[str]:
    """Yield a message for each task that is neither the user's own nor the harness's."""
    asked = dict.fromkeys(
        str(node.config["task"]) for node in missing if node.stage == "harness" and node.config["file"] is None
    )
    if not asked:
        return
    assert run.evaluate.harness is not None
    index, local = own_tasks(), _local_tasks(run.evaluate.harness.include_path)
    for name in asked:
        if name in index.groups:
            yield f"{KEY}.tasks: {name} is a group; name its tasks ({index.groups[name]})"
        elif name not in index.tasks:
            yield f"{KEY}.tasks: no task '{name}'{_nearest(name, [*index.tasks, *local.tasks])}"


def _local_tasks(include_path: str | None) -> TaskIndex:
    if include_path is None:
        return TaskIndex({}, {})
    folder = Path(include_path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"{KEY}.include_path: {include_path}: no such directory")
    return index_tasks(folder)


def _nearest(name: str, known: list[str]) -> str:
    """The nearest of all tasks; if none is near, a hint, because they are too many to list."""
    found = nearest(name, known)
    return found if "did you mean" in found else "; `lm_eval ls tasks` lists the harness's own"
