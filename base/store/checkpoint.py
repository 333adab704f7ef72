"""Artifacts and the store that keeps them: whole or not at all, found by content key, verified before use.

An artifact is a directory named by its content key: a Hugging Face checkpoint or the scores of one, plus
`manifest.json`. It is written to a temporary folder, synced and renamed. The store is the one truth about what is
done. This module is free of torch so that planning starts fast.
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
# Stages whose artifacts are small, and whose files the plan's readers read.
MEASUREMENTS = ("evaluate", "harness", "shift", "cosines")
UNSENT = "unsent_to_store"
# Of the store: what is being written.
STAGING = ".staging"
logger = logging.getLogger(__name__)


class CorruptedArtifactError(UserError):
    """An artifact whose files are not what its manifest says."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Artifact:
    """A reference to a stored checkpoint or score sheet; weights stay on disk.

    Attributes:
        key: Content key: hash of all that decides the result, known at plan time.
        uri: Directory of the files.
        digest: Hash of the files themselves (weights, model config, tokenizer; or scores).
        manifest: Everything known about how it was made.
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
        """The node's name in the run that made it, for people."""
        return str(self.manifest["name"])


class Store:
    """Content-addressed directories under `home/store`, work in progress under `home/work`, locks beside them.

    With a mirror (`MOPD_STORE`), what another machine made is found there and brought when it is needed, and what is
    made here is sent.

    Args:
        home: `$MOPD_HOME`.
        faults: Gets the messages of artifacts with a damaged manifest, which `find` then counts as absent; None
            raises.

    Raises:
        UserError: the home, or the store in it, is something else than a folder.
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
        """Return the artifact of a key if it stands whole, without reading its weights.

        One that stands in the mirror alone is brought if it is a measurement; of a checkpoint only the manifest is
        here until `get`.

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
            raise CorruptedArtifactError(f"{path}: a file where the folder of an artifact belongs; {_mend(key)}", key)
        try:
            manifest = read_object(path / MANIFEST)
        except DocumentError as error:
            raise CorruptedArtifactError(f"{path / MANIFEST}: {error}; {_mend(key)}", key) from None
        wanted: dict[str, type] = {"digest": str, "name": str, "files": dict}
        if odd := next((name for name, kind in wanted.items() if not isinstance(manifest.get(name), kind)), None):
            raise CorruptedArtifactError(f"{path / MANIFEST}: its '{odd}' is missing or damaged; {_mend(key)}", key)
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
            self._bring(key)
        self.verify(artifact)
        return artifact

    def is_here(self, artifact: Artifact) -> bool:
        """Whether an artifact's files are on this machine, and not in the mirror alone."""
        return (artifact.path / MANIFEST).exists()

    def _find_in_mirror(self, key: str) -> Artifact | None:
        if self.mirror is None or not self.mirror.holds(key):
            return None
        manifest = self.mirror.manifest(key)
        if manifest.get("stage") in MEASUREMENTS:
            self._bring(key)
        return Artifact(key=key, uri=str(self.root / key), digest=manifest["digest"], manifest=manifest)

    def _bring(self, key: str) -> None:
        """Download an artifact; another process that brings it at the same time does no harm."""
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
        """Send what the mirror did not take when it was made.

        Returns:
            What it still does not take, a line each.
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
        """Hash every file of the artifact against its manifest; a file unchanged since the last time is trusted.

        What stands in the mirror alone is verified when it is brought.

        Raises:
            CorruptedArtifactError: names the file, what was expected and how to mend it; or a name leads elsewhere.
        """
        if not self.is_here(artifact) and self.mirror is not None and self.mirror.holds(artifact.key):
            return
        if stray := stray_name(artifact.manifest["files"]):
            said = f"{stray_message(str(artifact.path / MANIFEST), stray)}; {_mend(artifact.key)}"
            raise CorruptedArtifactError(said, artifact.key)
        seal = self.root / ".verified" / artifact.key
        state = {name: _stamp(artifact.path / name) for name in artifact.manifest["files"]}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            if json.loads(seal.read_text()) == state:
                return
        for name, expected in artifact.manifest["files"].items():
            path = artifact.path / name
            if not path.exists():
                raise CorruptedArtifactError(
                    f"{path}: missing from {artifact.name}; {_mend(artifact.key)}", artifact.key
                )
            found = hash_file(path)
            if found != expected:
                raise CorruptedArtifactError(
                    f"{path}: corrupted ({artifact.name}): digest {found[:12]}, expected {expected[:12]}; "
                    f"{_mend(artifact.key)}",
                    artifact.key,
                )
        seal.parent.mkdir(exist_ok=True)
        write_whole(seal, json.dumps(state))

    def commit(self, folder: Path, key: str, manifest: Mapping[str, Any]) -> Artifact:
        """Move a finished folder into the store under `key`: add the manifest, sync, rename.

        Args:
            folder: A folder made by `staging`, with all files written.
            manifest: What to record; `format_version`, `key`, `files`, `digest` and `created` are added.
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
            # Noted before it stands here, so that a kill between the two leaves nothing unsent.
            (self.home / UNSENT).mkdir(exist_ok=True)
            (self.home / UNSENT / key).touch()
        os.rename(folder, target)
        sync_to_disk(self.root)
        for fault in self.send_left_over():
            logger.warning("%s; it is sent with the next artifact or run", fault)
        return Artifact(key=key, uri=str(target), digest=digest, manifest=whole)

    def staging(self, key: str) -> Path:
        """Make an empty temporary folder on the store's file system; what a failed attempt left there goes first.

        Whoever makes a node holds its lock, so no one else is writing under this key.
        """
        folder = self.root / STAGING / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def work(self, key: str) -> Path:
        """The folder of a node's work in progress: journal, log and saved steps."""
        path = self.home / "work" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def lock(self, key: str) -> FileLock:
        """The lock that makes two runs which need the same node train it once; free when its holder is gone."""
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
        """Every whole artifact in the store and its mirror."""
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


def _mend(key: str) -> str:
    return f"run again with --discard-corrupted to set it aside and make it anew (key {key})"


def sync_to_disk(path: Path) -> None:
    """Have the kernel write a file or a folder's entries out, so that a power cut does not lose them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file: a reader, or whoever comes after a kill, finds the old text or the new one, whole.

    Raises:
        IsADirectoryError: there is a folder of that name.
    """
    if path.is_dir():
        # `os.replace` would name the temporary file.
        raise IsADirectoryError(errno.EISDIR, "a folder where a file belongs", str(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
