"""The mirror of the store: a location shared by all machines, at any fsspec URL (`s3://…`, `gs://…`, a shared folder).

An artifact's files are under `KEY/DIGEST/`, its manifest is at `KEY/manifest.json` and written last. So an artifact is
complete or absent, and two machines that make the same key at once never mix their files. Free of torch.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from base.errors import UserError

VARIABLE = "MOPD_STORE"
MANIFEST = "manifest.json"
ASIDE = "corrupted"
# How long a listing of the keys is used: another machine may add a key at any time.
FRESH_SECONDS = 5.0
NEVER = float("-inf")
logger = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def mirror_of(url: str) -> "Mirror":
    """The mirror at a URL; one object per process, which shares connections and listings.

    Raises:
        UserError: the URL's scheme needs a package that is not installed, or is unknown.
    """
    return Mirror(url)


def mirror_of_environment() -> "Mirror | None":
    """The mirror that `MOPD_STORE` names; None if it is not set."""
    url = os.environ.get(VARIABLE, "")
    return mirror_of(url) if url else None


class Mirror:
    """Artifacts at an fsspec URL.

    Attributes:
        name: The URL without credentials.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        parts = urlsplit(url)
        self.name = url.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2], 1) if "@" in parts.netloc else url
        try:
            self._fs, self._root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{VARIABLE}: {self.name}: {error}") from None
        self._keys: set[str] = set()
        self._listed = NEVER

    def holds(self, key: str) -> bool:
        """Whether the mirror has a complete artifact of a key.

        Raises:
            UserError: the mirror could never be read; its content is unknown then, and assuming that the artifact is
                absent would make it a second time.
        """
        return key in self.keys()

    def keys(self) -> frozenset[str]:
        """The keys of all artifacts in the mirror, at most a few seconds old, or from the last time it could be read.

        Raises:
            UserError: the mirror could never be read.
        """
        if time.monotonic() - self._listed > FRESH_SECONDS:
            try:
                found = self._fs.glob(f"{self._root}/*/{MANIFEST}", refresh=True) if self._exists() else []
            except Exception as error:  # every file system has its own errors
                if self._listed == NEVER:
                    raise self._fault("cannot be read", error) from error
                logger.warning("%s; its last listing is used", self._fault("cannot be read", error))
            else:
                self._keys = {path.rstrip("/").split("/")[-2] for path in found}
            self._listed = time.monotonic()
        return frozenset(self._keys)

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest of a key.

        Raises:
            UserError: it cannot be read.
        """
        try:
            loaded: dict[str, Any] = json.loads(self._fs.cat_file(f"{self._root}/{key}/{MANIFEST}"))
        except Exception as error:
            raise self._fault(f"{key}/{MANIFEST} cannot be read", error) from error
        return loaded

    def send(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Upload a committed artifact, the manifest last.

        Raises:
            UserError: the upload failed; the artifact is not visible in the mirror then.
        """
        key, digest = manifest["key"], manifest["digest"]
        if stray := stray_name(manifest["files"]):
            raise UserError(stray_message(str(folder / MANIFEST), stray))
        try:
            for name in manifest["files"]:
                target = f"{self._root}/{key}/{digest}/{name}"
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / name), target)
            text = (folder / MANIFEST).read_bytes()
            self._write(f"{self._root}/{key}/{MANIFEST}", text)
        except Exception as error:
            raise self._fault(f"{key} cannot be uploaded", error) from error
        self._keys.add(key)

    def bring(self, key: str, folder: Path) -> None:
        """Download an artifact into an empty folder, its manifest last.

        Raises:
            UserError: it cannot be read, or its manifest names a file outside of the folder; the folder is removed
                then.
        """
        try:
            manifest = self.manifest(key)
            if stray := stray_name(manifest["files"]):
                raise UserError(stray_message(f"{VARIABLE}: {self.name}/{key}/{MANIFEST}", stray))
            for name in manifest["files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{key}/{manifest['digest']}/{name}", str(folder / name))
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise error if isinstance(error, UserError) else self._fault(f"{key} cannot be read", error) from error
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))

    def set_aside(self, key: str) -> None:
        """Hide a corrupted artifact by moving its manifest away; nothing is deleted."""
        target = f"{self._root}/{ASIDE}/{key}-{int(time.time())}.json"
        try:
            self._fs.makedirs(f"{self._root}/{ASIDE}", exist_ok=True)
            self._fs.mv(f"{self._root}/{key}/{MANIFEST}", target)
        except Exception as error:
            raise self._fault(f"{key} cannot be set aside", error) from error
        self._keys.discard(key)

    def remove(self, key: str) -> None:
        """Delete an artifact, its manifest first, so that it is never visible in part."""
        try:
            self._fs.rm_file(f"{self._root}/{key}/{MANIFEST}")
            self._fs.rm(f"{self._root}/{key}", recursive=True)
        except Exception as error:
            raise self._fault(f"{key} cannot be removed", error) from error
        self._keys.discard(key)

    def _write(self, path: str, content: bytes) -> None:
        """Write a small file atomically: object stores do so by themselves; in a file system it is renamed into
        place."""
        if "file" in self._fs.protocol or "local" in self._fs.protocol:
            temporary = f"{path}.{os.getpid()}.tmp"
            self._fs.pipe_file(temporary, content)
            os.replace(temporary, path)
        else:
            self._fs.pipe_file(path, content)

    def _exists(self) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._root))

    def _fault(self, what: str, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return UserError(f"{VARIABLE}: {self.name}: {what} ({reason})")


def stray_name(names: Iterable[str]) -> str | None:
    """The first of a manifest's file names that is outside of the artifact's folder; None if there is none.

    Manifests of a shared store are untrusted: a name such as `../x` would reach any file.
    """
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return name
    return None


def stray_message(manifest: str, name: str) -> str:
    """The message for a manifest that names such a file."""
    return f"{manifest}: names the file {name!r}, which is outside of its artifact's folder; it is refused"
