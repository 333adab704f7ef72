"""Artifacts and their store: written atomically, found by content key, verified before use.

An artifact is a directory named by its content key: a Hugging Face checkpoint or the scores of one, plus
`manifest.json`. It is written to a temporary folder, synced and renamed. The store alone decides which nodes are done.
This module is free of torch so that planning starts fast.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from base.documents import DocumentError, read_object
from base.errors import UserError
from base.hashing import stable_hash
from base.private import keep_private, require_folder
from base.store.mirror import MANIFEST, mirror_of_environment, stray_message, stray_name

FORMAT_VERSION = 1
# Stages with small artifacts, whose files are read during planning.
MEASUREMENTS = ("evaluate", "harness", "shift", "cosines")
UNSENT = "unsent_to_store"
# The store's folder of artifacts that are being written.
STAGING = ".staging"
logger = logging.getLogger(__name__)


class CorruptedArtifactError(UserError):
    """An artifact's files do not match its manifest."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Artifact:
    """A reference to a stored checkpoint or score sheet; weights stay on disk.

    Attributes:
        key: Content key: hash of everything that determines the result, available at plan time.
        uri: Directory of the files.
        digest: Hash of the files themselves (weights, model config, tokenizer; or scores).
        manifest: The full record of how it was made.
    """

    key: str
    uri: str
    digest: str
    manifest: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The directory as a path."""
        return Path(self.uri)

    @property
    def name(self) -> str:
        """The node's name in the run that made it, for readers."""
        return str(self.manifest["name"])


class Store:
    """Content-addressed directories under `home/store`, work in progress under `home/work`, locks under `home/locks`.

    With a mirror (`MOPD_STORE`), artifacts of other machines are found there and downloaded on demand, and artifacts
    made here are uploaded.

    Args:
        home: `$MOPD_HOME`.
        faults: A list for the messages on damaged manifests; `find` then treats their artifacts as absent. With None,
            `find` raises.

    Raises:
        UserError: the home, or the store in it, is not a folder.
    """

    def __init__(self, home: Path, faults: list[str] | None = None) -> None:
        self.home = home
        self.root = home / "store"
        self._faults = faults
        for place in (home, self.root):
            require_folder(place)
        keep_private(home)
        self.root.mkdir(exist_ok=True)
        self.mirror = mirror_of_environment()

    def find(self, key: str) -> Artifact | None:
        """Return the artifact of a key if it is complete, without reading its weights; else None.

        A measurement that is only in the mirror is downloaded. For a checkpoint that is only in the mirror, the
        manifest is read, and the files are downloaded by `get`.

        Raises:
            CorruptedArtifactError: its manifest cannot be read.
            UserError: the mirror cannot be read.
        """
        path = self.root / key
        try:
            manifest = self._manifest(key)
        except FileNotFoundError:
            return self._find_in_mirror(key)
        except CorruptedArtifactError as error:
            if self._faults is None:
                raise
            if str(error) not in self._faults:
                self._faults.append(str(error))
            return None
        return Artifact(key=key, uri=str(path), digest=manifest["digest"], manifest=manifest)

    def _manifest(self, key: str) -> dict[str, Any]:
        path = self.root / key
        if path.is_file():
            raise CorruptedArtifactError(f"{path}: a file in place of the folder of an artifact; {_remedy(key)}", key)
        try:
            manifest = read_object(path / MANIFEST)
        except DocumentError as error:
            raise CorruptedArtifactError(f"{path / MANIFEST}: {error}; {_remedy(key)}", key) from None
        wanted: dict[str, type] = {"digest": str, "name": str, "files": dict}
        if odd := next((name for name, kind in wanted.items() if not isinstance(manifest.get(name), kind)), None):
            raise CorruptedArtifactError(f"{path / MANIFEST}: its '{odd}' is missing or damaged; {_remedy(key)}", key)
        return manifest

    def get(self, key: str) -> Artifact:
        """Return and verify the artifact of a key.

        Raises:
            UserError: there is none.
            CorruptedArtifactError: its files differ from its manifest.
        """
        artifact = self.find(key)
        if artifact is None:
            raise UserError(f"no artifact {key} in {self.root}")
        if not self.is_here(artifact):
            self._download(key)
        self.verify(artifact)
        return artifact

    def is_here(self, artifact: Artifact) -> bool:
        """Whether an artifact's files are on this machine, and not only in the mirror."""
        return (artifact.path / MANIFEST).exists()

    def _find_in_mirror(self, key: str) -> Artifact | None:
        if self.mirror is None or not self.mirror.holds(key):
            return None
        manifest = self.mirror.manifest(key)
        if manifest.get("stage") in MEASUREMENTS:
            self._download(key)
        return Artifact(key=key, uri=str(self.root / key), digest=manifest["digest"], manifest=manifest)

    def _download(self, key: str) -> None:
        """Download an artifact; several processes may do so at the same time."""
        assert self.mirror is not None
        folder = self.root / STAGING / f"{key}.{os.getpid()}.mirror"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.mirror.bring(key, folder)
        try:
            os.rename(folder, self.root / key)
        except OSError as error:
            shutil.rmtree(folder)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def send_left_over(self) -> list[str]:
        """Upload the artifacts that the mirror did not receive when they were made.

        Returns:
            A message for each artifact whose upload failed again.
        """
        if self.mirror is None:
            return []
        faults = []
        for path in sorted((self.home / UNSENT).glob("*")):
            artifact = self.find(path.name)
            try:
                if artifact is not None:
                    self.mirror.send(artifact.path, artifact.manifest)
            except UserError as error:
                faults.append(str(error))
            else:
                path.unlink(missing_ok=True)
        return faults

    def verify(self, artifact: Artifact) -> None:
        """Compare the hash of every file with the manifest; if no file has changed since the last time, skip hashing.

        An artifact that is only in the mirror is verified when it is downloaded.

        Raises:
            CorruptedArtifactError: a file is missing or damaged, or the manifest names a file outside of the folder.
                The message names the file, the expected hash and the remedy.
        """
        if not self.is_here(artifact) and self.mirror is not None and self.mirror.holds(artifact.key):
            return
        if stray := stray_name(artifact.manifest["files"]):
            message = f"{stray_message(str(artifact.path / MANIFEST), stray)}; {_remedy(artifact.key)}"
            raise CorruptedArtifactError(message, artifact.key)
        seal = self.root / ".verified" / artifact.key
        state = {name: _stamp(artifact.path / name) for name in artifact.manifest["files"]}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            if json.loads(seal.read_text()) == state:
                return
        for name, expected in artifact.manifest["files"].items():
            path = artifact.path / name
            if not path.exists():
                raise CorruptedArtifactError(
                    f"{path}: missing from {artifact.name}; {_remedy(artifact.key)}", artifact.key
                )
            found = hash_file(path)
            if found != expected:
                raise CorruptedArtifactError(
                    f"{path}: corrupted ({artifact.name}): digest {found[:12]}, expected {expected[:12]}; "
                    f"{_remedy(artifact.key)}",
                    artifact.key,
                )
        seal.parent.mkdir(exist_ok=True)
        write_whole(seal, json.dumps(state))

    def commit(self, folder: Path, key: str, manifest: Mapping[str, Any]) -> Artifact:
        """Move a finished folder into the store under `key`: add the manifest, sync, rename.

        Args:
            folder: A folder made by `staging`, with all files written.
            key: The content key.
            manifest: The entries to record; `format_version`, `key`, `files`, `digest` and `created` are added.

        Returns:
            The artifact in the store.
        """
        files = {str(p.relative_to(folder)): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        digest = stable_hash(files)
        whole = dict(manifest) | {
            "format_version": FORMAT_VERSION,
            "key": key,
            "files": files,
            "digest": digest,
            "created": time.time(),
        }
        (folder / MANIFEST).write_text(json.dumps(whole, indent=1, sort_keys=True))
        for path in folder.rglob("*"):
            sync_to_disk(path)
        sync_to_disk(folder)
        target = self.root / key
        if self.mirror is not None:
            # Marked before the rename, so that a kill between the two cannot leave an artifact that is never uploaded.
            (self.home / UNSENT).mkdir(exist_ok=True)
            (self.home / UNSENT / key).touch()
        os.rename(folder, target)
        sync_to_disk(self.root)
        for fault in self.send_left_over():
            logger.warning("%s; the upload is repeated with the next artifact or run", fault)
        return Artifact(key=key, uri=str(target), digest=digest, manifest=whole)

    def staging(self, key: str) -> Path:
        """Make an empty temporary folder on the store's file system; files of a failed attempt are removed first.

        The caller must hold the node's lock, so that no other process writes under this key.
        """
        folder = self.root / STAGING / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def work(self, key: str) -> Path:
        """The folder of a node's work in progress: journal, log and saved states."""
        path = self.home / "work" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def lock(self, key: str) -> FileLock:
        """The lock of a key, so that two runs that need the same node train it once; freed when its holder ends."""
        path = self.home / "locks" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def set_aside(self, key: str) -> Path:
        """Move a corrupted artifact out of the store, so that its node runs again; nothing is deleted."""
        target = self.home / "corrupted" / f"{key}-{int(time.time())}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.root / key, target)
        if self.mirror is not None and self.mirror.holds(key):
            self.mirror.set_aside(key)
        return target

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts in the store and its mirror."""
        here = {path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")}
        for key in sorted(here | (self.mirror.keys() if self.mirror else frozenset())):
            if (artifact := self.find(key)) is not None:
                yield artifact


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _remedy(key: str) -> str:
    return f"run again with --discard-corrupted to set it aside and make it again (key {key})"


def sync_to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk, so that a power failure does not lose them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file atomically: readers, also after a kill, find either the old or the new text, complete.

    Raises:
        IsADirectoryError: there is a folder of that name.
    """
    if path.is_dir():
        # The error of `os.replace` would name the temporary file.
        raise IsADirectoryError(errno.EISDIR, "a folder in place of a file", str(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
