"""The fingerprints of imported checkpoints, cached in the home. Free of torch."""

import json
from pathlib import Path

from base.documents import DocumentError, read_object
from base.hashing import stable_hash
from base.store.checkpoint import write_whole
from base.store.source import Source

FILE = "fingerprints.json"


def source_fingerprint(source: Source, home: Path) -> str:
    """The source's fingerprint, cached by path, size and time, as hashing it may be slow."""
    if source.kind == "hub":
        return source.fingerprint()
    path = Path(source.location)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stamp = stable_hash([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files])
    cache = home / FILE
    try:
        known = read_object(cache)
    except (FileNotFoundError, DocumentError):
        known = {}  # they are made anew
    if not isinstance(known.get(stamp), str):
        known[stamp] = source.fingerprint()
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, json.dumps(known))
    return str(known[stamp])
