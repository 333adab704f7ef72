"""Finds lm-evaluation-harness tasks and their files without importing the harness, which takes seconds.

Paths in a task's `dataset_kwargs` are relative to the folder of its YAML, as are those of `include` and `!function`.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from base.errors import UserError
from base.extras import harness_version
from base.hashing import stable_hash
from base.store.checkpoint import hash_file

# The run file's key of the harness.
KEY = "evaluate.harness"
# Loaders of `datasets` that read files named in dataset_kwargs.
FILE_LOADERS = {"json", "csv", "parquet", "text", "arrow"}
_NAMED = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#\[{&*!]+)""", re.MULTILINE)


@dataclass(frozen=True)
class TaskIndex:
    """Names and YAML files of the tasks in a directory.

    Attributes:
        tasks: Name of a single task -> its YAML.
        groups: Name of a group of tasks -> its YAML.
    """

    tasks: dict[str, Path]
    groups: dict[str, Path]


def index_tasks(folder: Path) -> TaskIndex:
    """Index the YAMLs below a directory, 14,000 in about a second; the first of two with the same name counts."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        named = {kind: name.decode() for kind, name in reversed(_NAMED.findall(path.read_bytes()))}
        if task := named.get(b"task"):
            tasks.setdefault(task, path)
        elif group := named.get(b"group"):
            groups.setdefault(group, path)
    return TaskIndex(tasks, groups)


def own_tasks() -> TaskIndex:
    """Index the tasks that come with the installed harness.

    Raises:
        UserError: the harness is not installed.
    """
    harness_version(KEY)
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return index_tasks(Path(next(iter(spec.submodule_search_locations))) / "tasks")


def task_fingerprint(path: Path) -> str:
    """Hash of a task: its YAML, the YAMLs included, the files of its `!function`s, and its local data.

    Raises:
        UserError: a YAML cannot be read, or a file that it names does not exist.
    """
    files: set[Path] = set()
    config = _merged(path, files, ())
    files.update(_data_files(config, path))
    return stable_hash({os.path.relpath(file, path.parent): hash_file(file) for file in sorted(files)})


def _merged(path: Path, files: set[Path], includers: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML's contents merged over those it includes; adds every file read or named as code to `files`."""
    if path in includers:
        raise UserError(f"{path}: includes itself")
    files.add(path)

    class Loader(yaml.SafeLoader):
        """Reads `!function MODULE.NAME` as a file beside the YAML, if there is one."""

    def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
        name = str(loader.construct_scalar(node))
        beside = path.parent / f"{name.rpartition('.')[0].replace('.', '/')}.py"
        if beside.is_file():
            files.add(beside)
        return name

    Loader.add_constructor("!function", function)
    try:
        own = yaml.load(path.read_bytes(), Loader)
    except FileNotFoundError:
        raise UserError(f"{includers[-1] if includers else path}: there is no {path}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: not a task: a mapping is expected")
    included = own.pop("include", [])
    config: dict[str, Any] = {}
    for other in included if isinstance(included, list) else [included]:
        config |= _merged((path.parent / other).resolve(), files, (*includers, path))
    return config | own


def _data_files(config: dict[str, Any], path: Path) -> Iterator[Path]:
    """The local files that a task's data are read from; none for data on the Hub."""
    source = str(config.get("dataset_path", ""))
    kwargs = config.get("dataset_kwargs") or {}
    if source not in FILE_LOADERS:
        yield from _below(path.parent / source) if source else ()
        return
    if folder := kwargs.get("data_dir"):
        yield from _below(path.parent / str(folder))
    for name in _names(kwargs.get("data_files")):
        if "://" in name:
            continue
        found = sorted(file for file in path.parent.glob(name) if file.is_file()) if not os.path.isabs(name) else []
        found = found or [file for file in [path.parent / name] if file.is_file()]
        if not found:
            raise UserError(f"{path}: dataset_kwargs.data_files: there is no {path.parent / name}")
        yield from found


def _names(value: Any) -> list[str]:
    """The file names in `data_files`, which holds one, several, or either by split."""
    if isinstance(value, dict):
        return [name for part in value.values() for name in _names(part)]
    if isinstance(value, list):
        return [str(name) for name in value]
    return [] if value is None else [str(value)]


def _below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
