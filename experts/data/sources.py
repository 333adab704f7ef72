"""Sources of rows: a data set on the Hub, or a local file or folder."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import UserError, nearest
from experts.data.files import Place, Row, endings, file_format, files_of_split, read_rows

# Options that name a file, a folder or a Hub id.
PATH_OPTIONS = ("path", "held_out_path")


def placed(path: str, folder: Path) -> str:
    """A run file's path resolved from that file's folder; a Hub id and an address are returned unchanged."""
    if "://" in path:
        return path
    place = folder / Path(path).expanduser()
    return os.path.abspath(place) if place.exists() or _is_local(path) else path


def located(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A domain's options in a run file, with the paths in them resolved from that file's folder."""
    return {**options, **{key: placed(value, folder) for key, value in _named(options).items()}}


def typed(path: str, folder: Path) -> str:
    """A path relative to the working folder, rewritten for a run file in `folder`; unchanged if it does not exist."""
    if os.path.isabs(path) or not os.path.exists(path):
        return path
    return os.path.relpath(os.path.abspath(path), folder.resolve())


def typed_options(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A domain's options from the command line, with the paths in them rewritten by `typed`."""
    return {**options, **{key: typed(value, folder) for key, value in _named(options).items()}}


def _named(options: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key in PATH_OPTIONS if isinstance(value := options.get(key), str)}


def _is_local(path: str) -> bool:
    """Whether a path can only be local, not a Hub id."""
    place = Path(path)
    return file_format(place) is not None or place.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Attributes:
        key: The option that names it.
        path: The path in the run file.
        local: The file or folder; None for a Hub id.
    """

    key: str
    path: str
    local: Path | None

    def rows(self, split: str, name: str | None, revision: str | None) -> Iterator[tuple[Place, Row]]:
        """Yield the rows of a split with their places; `name` is a Hub data set's configuration, or a subfolder.

        Raises:
            UserError: something cannot be read.
            ConnectionError: the Hub cannot be reached, which is not the user's mistake.
        """
        if self.local is None:
            yield from _hub_rows(self.path, name, revision, split)
            return
        folder = self.local / (name or "") if self.local.is_dir() else None
        if folder is not None and not folder.is_dir():
            raise UserError(f"'{self.path}' has no folder '{name}'")
        for path in [self.local] if folder is None else files_of_split(folder, split):
            yield from _parquet_rows(path) if file_format(path) == "parquet" else read_rows(path)

    def digest(self) -> Any:
        """The data's part of a fingerprint: local content, or the Hub id."""
        if self.local is None:
            return self.path
        if self.local.is_file():
            return _file_digest(self.local)
        files = sorted(path for path in self.local.rglob("*") if path.is_file())
        return {str(path.relative_to(self.local)): _file_digest(path) for path in files}


def find_source(options: str, key: str, path: str) -> Source:
    """Find the local file or folder of a path; any other path is a Hub id.

    Args:
        options: Key of the domain's options, for the message of an error.
        key: The option that holds the path.
        path: The path in the run file.

    Raises:
        UserError: the path can only be local, and there is no such file, or it is of another format.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return Source(key, path, place)
    if place.exists() or place.is_symlink():
        if not place.is_file():
            raise UserError(f"{options}.{key}: '{path}' is neither a file nor a folder")
        if file_format(place) is None:
            raise UserError(f"{options}.{key}: '{path}' is not a file of rows; its name must end in {endings()}")
        return Source(key, path, place)
    if _is_local(path):
        siblings = [str(other) for other in place.parent.iterdir()] if place.parent.is_dir() else []
        close = nearest(str(place), siblings)
        hint = close if "did you mean" in close else "; a relative path starts at the run file's folder"
        raise UserError(f"{options}.{key}: no such file '{path}'{hint}")
    return Source(key, path, None)


def _hub_rows(path: str, name: str | None, revision: str | None, split: str) -> Iterator[tuple[Place, Row]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with _no_progress_bars():
            rows = datasets.load_dataset(path, name, revision=revision, split=split)
    except (DatasetsError, ValueError) as error:
        raise UserError(f"cannot read split '{split}' of '{path}': {error.__cause__ or error}") from error
    for number, row in enumerate(rows, 1):
        yield Place(f"{path} ({split})", number), row


def _parquet_rows(path: Path) -> Iterator[tuple[Place, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        yield Place(str(path), number), row


def _file_digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep `datasets` from drawing progress bars into the log; its setting is restored afterwards."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
