"""The files of a run file's own programs. Free of torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def place_programs(raw: dict[str, Any], folder: Path) -> None:
    """Resolve the files of programs from the run file's folder, also where they are arguments of the program.

    Args:
        raw: The raw run file; changed in place.
        folder: The run file's folder.
    """
    for command in _commands(raw):
        files, words = command.get("files"), command.get("run")
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            continue
        placed = {file: str((folder / file).resolve()) for file in files}
        command["files"] = [placed[file] for file in files]
        if isinstance(words, list):
            command["run"] = [_escaped(placed, word) if isinstance(word, str) else word for word in words]


def _escaped(placed: dict[str, str], word: str) -> str:
    """The path of a file, whose braces are no names of places; any other word is unchanged."""
    return placed[word].replace("{", "{{").replace("}", "}}") if word in placed else word


def _commands(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The programs in a run file: those of experts, of the merge and of its variants."""
    experts, merge = raw.get("experts"), raw.get("merge")
    entries: list[Any] = []
    if isinstance(experts, dict):
        entries += [expert.get("train") for expert in experts.values() if isinstance(expert, dict)]
    if isinstance(merge, dict):
        variants = merge.get("variants")
        entries += [merge, *(variants.values() if isinstance(variants, dict) else ())]
    for entry in entries:
        if isinstance(entry, dict) and isinstance(command := entry.get("command"), dict):
            yield command
