"""One hash of values, for keys, splits and fingerprints."""

import hashlib
import json
from typing import Any


def stable_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, key order ignored."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
