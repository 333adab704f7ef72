"""Reads YAML and JSON files of users or other programs, within bounds.

A file must be regular and small, without repeated keys, deep nesting or multiplying aliases. So reading takes time and
memory in proportion to the limits below, for any content.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from base.errors import UserError

LONGEST_YAML_BYTES = 2**20
LONGEST_JSON_BYTES = 64 * 2**20
MOST_DEPTH = 50
# Values of a file with all aliases expanded.
MOST_VALUES = 100_000


class DocumentError(Exception):
    """A text cannot be used; the message is one line and does not name the file."""


def read_text(path: Path, most: int) -> str:
    """A regular file's UTF-8 text, without a byte order mark.

    Args:
        path: The file; may be a symbolic link to a regular file.
        most: Largest size in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        DocumentError: it is not a regular file, too large, unreadable or not UTF-8 text.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DocumentError("is a folder, not a file" if stat.S_ISDIR(found.st_mode) else "is not a regular file")
        if found.st_size > most:
            raise DocumentError(f"has {found.st_size:,} bytes, the limit is {most:,}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"is not UTF-8 text: byte {error.start}: {error.reason}") from None
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # A path may contain a null byte, or a circle of links.
        raise DocumentError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_yaml(text: str) -> Any:
    """The values of a YAML text; every alias is a separate copy.

    Raises:
        DocumentError: the text is not valid YAML, repeats a key, or exceeds a limit.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Size().of(node)
        return _unshared(loader.construct_document(node))
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, AttributeError) as error:
        # PyYAML does not catch Python's errors for an invalid date, or for a number of thousands of digits.
        raise DocumentError(f"not valid YAML: {error}") from None


def parse_value(assignment: str, text: str) -> Any:
    """The value of a `KEY=VALUE` from the command line.

    Args:
        assignment: The option with its argument, for messages.
        text: The text after the `=`.

    Raises:
        UserError: the text is not valid YAML, or exceeds a limit.
    """
    try:
        return parse_yaml(text)
    except DocumentError as error:
        raise UserError(f"{assignment}: the value: {error}") from None


def one_line(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: Path) -> Any:
    """The values of a YAML file; see `read_text` and `parse_yaml` for what raises."""
    return parse_yaml(read_text(path, LONGEST_YAML_BYTES))


def parse_json(text: str) -> Any:
    """The values of a JSON text.

    Raises:
        DocumentError: the text is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise DocumentError(f"not readable as JSON: {error}") from None
    except RecursionError:
        raise DocumentError("not readable as JSON: it is nested too deeply") from None


def read_object(path: Path, most: int = LONGEST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        DocumentError: see `read_text` and `parse_json`; or the value is no object.
    """
    value = parse_json(read_text(path, most))
    if not isinstance(value, dict):
        raise DocumentError(f"contains {value!r:.40}, not a JSON object")
    return value


def user_error(path: Path | str, error: DocumentError, remedy: str = "") -> UserError:
    """The error for a file that cannot be used, with its remedy."""
    return UserError(f"{path}: {error}{f'; {remedy}' if remedy else ''}")


class _Loader(yaml.SafeLoader):
    """Limits the nesting depth, so that no text can exhaust Python's stack."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} deep{_place(self.peek_event().start_mark)}")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Size:
    """Counts the values of a composed document with all aliases expanded, visiting each node once."""

    def __init__(self) -> None:
        # None while a node is being counted.
        self._sizes: dict[int, int | None] = {}

    def of(self, node: yaml.Node) -> int:
        """The number of values below a node.

        Raises:
            yaml.YAMLError: there are too many values, a node contains itself, or a key is repeated.
        """
        if id(node) in self._sizes:
            size = self._sizes[id(node)]
            if size is None:
                raise yaml.YAMLError(f"an alias contains itself{_place(node.start_mark)}")
            return size
        self._sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            _refuse_repeats(node)
            total += sum(self.of(key) + self.of(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(self.of(each) for each in node.value)
        if total > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values with its aliases expanded")
        self._sizes[id(node)] = total
        return total


def _refuse_repeats(node: yaml.MappingNode) -> None:
    seen: dict[tuple[str, str], yaml.Mark] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = (key.tag, key.value)
        if name in seen:
            raise yaml.YAMLError(
                f"the key '{key.value:.60}' is repeated in one mapping, in lines {seen[name].line + 1} and "
                f"{key.start_mark.line + 1}"
            )
        seen[name] = key.start_mark


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"


def _unshared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value
