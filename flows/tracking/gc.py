"""Garbage collection of artifacts that no run plans and no registered student descends from.

Kept are: every node of every run's lock file; every present and former champion; every version in MLflow's registry or
in an outbox for it; artifacts not yet sent to the mirror (`MOPD_STORE`); artifacts that are being made; and the
ancestors of all these, with their measurements. Ancestors are followed through the mirror too. If the manifest of one
is found nowhere, its own ancestors are unknown, and every artifact is kept. Only this machine's copies are removed,
never those in a mirror.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import Timeout

from base.errors import UserError
from base.store.checkpoint import MEASUREMENTS, Artifact, Store
from base.store.checkpoint import UNSENT as UNSENT_TO_STORE
from base.store.mirror import VARIABLE
from flows.plan.champion_history import read_history
from flows.plan.state_files import CHAMPION_FILE, read_json

LOCK = "gc"
DAY_SECONDS = 86400.0
UNSENT = "unsent"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """One removable artifact or folder.

    Attributes:
        kind: `checkpoint`, `measurement`, `work` (journals and saved steps), `leftover` (of a killed write) or
            `corrupted`.
        name: Name of the artifact or description of the folder.
        key: Content key; empty for leftovers.
        path: The folder to remove.
        size: Bytes.
        made: Time of the last change, in seconds since the epoch.
    """

    kind: str
    name: str
    key: str
    path: Path
    size: int
    made: float


@contextmanager
def plan_lock(store: Store) -> Iterator[None]:
    """Exclude garbage collection while a run plans and writes its lock file, and the reverse."""
    with store.lock(LOCK):
        yield


def find_garbage(
    store: Store, registered: Iterable[str], days: float = 0.0, *, corrupted: bool = False
) -> list[Garbage]:
    """The removable artifacts and folders, largest first.

    Args:
        store: The artifacts.
        registered: Content keys in the registry.
        days: Minimum age; younger ones are kept.
        corrupted: Also return artifacts that were set aside as corrupted.

    Raises:
        CorruptedArtifactError: a manifest cannot be read, so the artifact's ancestors are unknown.
    """
    here = [artifact for artifact in store.artifacts() if store.is_here(artifact)]
    kept = keep(store, here, registered)
    found = [
        _garbage(
            "measurement" if _is_measurement(artifact) else "checkpoint", artifact.name, artifact.key, artifact.path
        )
        for artifact in here
        if artifact.key not in kept
    ]
    gone = {artifact.key for artifact in here} - kept
    busy = set(_busy(store))
    for folder in _folders(store.home / "work"):
        if folder.name in gone or (
            folder.name not in kept and folder.name not in busy and store.find(folder.name) is None
        ):
            found.append(_garbage("work", f"work of {folder.name}", folder.name, folder))
    for folder in _folders(store.root / ".staging"):
        if folder.name.partition(".")[0] not in busy and not _is_being_brought(folder):
            found.append(_garbage("leftover", folder.name, "", folder))
    if corrupted:
        found += [_garbage("corrupted", folder.name, "", folder) for folder in _folders(store.home / "corrupted")]
    oldest = time.time() - days * DAY_SECONDS
    return sorted((each for each in found if each.made <= oldest), key=lambda each: -each.size)


def keep(store: Store, here: Iterable[Artifact], registered: Iterable[str]) -> set[str]:
    """Content keys to keep: those of referenced artifacts, their ancestors, and the measurements of both.

    If an ancestor's manifest is neither here nor in the mirror, all artifacts here are kept, with a warning.
    """
    manifests = {artifact.key: artifact.manifest for artifact in here}
    planned, kept, unknown = set(_planned(store)), set[str](), set[str]()
    made_from: dict[str, str] = {}
    waiting = [*registered, *planned, *_pinned(store), *_champions(store), *_unsent(store), *_unsent_to_store(store)]
    waiting += _busy(store)
    while waiting:
        key = waiting.pop()
        if key in kept:
            continue
        kept.add(key)
        manifest = manifests.get(key) or _manifest_in_mirror(store, key)
        if manifest is None:
            unknown.add(key)
            continue
        parents = _parents(manifest)
        made_from |= {parent: f"{manifest['name']} ({key})" for parent in parents}
        waiting += parents
    # Planned nodes are exempt, because the lock file has their ancestors too.
    for key in sorted(unknown & made_from.keys() - planned):
        logger.warning(
            "%s was made from %s, whose manifest is neither in %s nor in a mirror, so its own ancestors are unknown: "
            "all artifacts are kept; set %s to the mirror that has it",
            *(made_from[key], key, store.root, VARIABLE),
        )
        kept |= manifests.keys()
    measured = {
        key
        for key, manifest in manifests.items()
        if manifest.get("stage") in MEASUREMENTS and _parents(manifest) and kept.issuperset(_parents(manifest))
    }
    return kept | measured


def remove(store: Store, garbage: Iterable[Garbage]) -> tuple[int, list[str]]:
    """Remove garbage, except what has come into use meanwhile.

    Returns:
        Bytes freed, and a line for each item that was not removed.
    """
    freed, stayed = 0, []
    for each in garbage:
        lock = store.lock(each.key or each.path.name.partition(".")[0])
        try:
            with lock.acquire(timeout=0):
                # One rename takes it out of the store, so that no process finds a part of it.
                target = store.root / ".staging" / f"removed-{each.path.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                each.path.rename(target)
                shutil.rmtree(target)
                if each.kind in ("checkpoint", "measurement"):
                    (store.root / ".verified" / each.key).unlink(missing_ok=True)
        except Timeout:
            stayed.append(f"{each.name}: in use")
        except FileNotFoundError:
            stayed.append(f"{each.name}: gone already")
        else:
            freed += each.size
    return freed, stayed


def registered_keys(store: Store) -> set[str]:
    """The content keys of all versions in MLflow's registry.

    Raises:
        UserError: the registry cannot be read.
    """
    from flows.tracking.models import registered_keys as read

    return read(store)


def _planned(store: Store) -> Iterator[str]:
    for path in (store.home / "runs").glob("*/lock.json"):
        yield from (str(node["key"]) for node in read_json(path).get("nodes", {}).values())


def _pinned(store: Store) -> Iterator[str]:
    """Keys to which mutable names, such as a champion's, were resolved."""
    for path in (store.home / "runs").glob("*/lock.json"):
        yield from (str(pin) for pin in read_json(path).get("pins", {}).values())


def _champions(store: Store) -> Iterator[str]:
    for path in (store.home / "runs").glob(f"*/{CHAMPION_FILE}"):
        for reign in read_history(store, path.parent.name):
            yield from (reign.student, *reign.scores.values())


def _unsent(store: Store) -> Iterator[str]:
    """Keys in operations not yet sent to MLflow: versions, and models whose files are read when they are sent."""
    for path in (store.home / "runs").glob(f"*/{UNSENT}/*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                yield from _keys_in(json.loads(line))
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while it wrote


def _unsent_to_store(store: Store) -> list[str]:
    """Keys not yet sent to the mirror, so that this machine has the only copy."""
    return [path.name for path in (store.home / UNSENT_TO_STORE).glob("*")] if store.mirror is not None else []


def _manifest_in_mirror(store: Store, key: str) -> Mapping[str, Any] | None:
    return store.mirror.manifest(key) if store.mirror is not None and store.mirror.holds(key) else None


def _is_being_brought(folder: Path) -> bool:
    """Whether a folder is a download from the mirror, `KEY.PID.mirror`, whose process still runs."""
    _, _, process = folder.name.removesuffix(".mirror").rpartition(".")
    return folder.name.endswith(".mirror") and process.isdigit() and psutil.pid_exists(int(process))


def _keys_in(operation: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(operation.get("key"), str):
        yield operation["key"]
    keys = operation.get("keys")
    if isinstance(keys, list):
        yield from (key for key in keys if isinstance(key, str))


def _busy(store: Store) -> list[str]:
    """Keys of artifacts that are being made, and of the checkpoints they are made from."""
    found = []
    for path in (store.home / "locks").glob("*.lock"):
        lock = store.lock(path.stem)
        try:
            with lock.acquire(timeout=0):
                continue
        except Timeout:
            found.append(path.stem)
        for spec in (store.home / "work" / path.stem).glob("spec*.json"):
            found += [str(key) for node in read_json(spec).get("nodes", []) for key in node.get("parents", {}).values()]
    return found


def _parents(manifest: Mapping[str, Any]) -> list[str]:
    parents = [str(parent["key"]) for parent in manifest.get("parents", {}).values()]
    base = manifest.get("adapter_base")
    return [*parents, str(base)] if base else parents


def _is_measurement(artifact: Artifact) -> bool:
    return artifact.manifest.get("stage") in MEASUREMENTS


def _garbage(kind: str, name: str, key: str, path: Path) -> Garbage:
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    return Garbage(kind, name, key, path, sum(sizes), max((file.stat().st_mtime for file in files), default=0.0))


def _folders(path: Path) -> list[Path]:
    return [each for each in sorted(path.iterdir()) if each.is_dir()] if path.is_dir() else []


def check_home(home: Path) -> None:
    """Check that a home exists.

    Raises:
        UserError: there is no store at the path.
    """
    if not (home / "store").is_dir():
        raise UserError(f"--home {home}: there is no store in it")
