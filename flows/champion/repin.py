"""Pins the mutable names of a run to their present targets."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.store.checkpoint import write_whole
from flows.plan.graph import build_graph
from flows.plan.lock import lock_path
from flows.plan.state_files import read_json
from flows.run_file.schema import RunConfig


def repin(config: RunConfig, home: Path) -> None:
    """Pin the mutable names of a run (`champion`, a Hub branch) to their present targets, and print what changed.

    Raises:
        UserError: a name has no target at present; then nothing is changed.
    """
    path = lock_path(home, config.name)
    lock = read_json(path)
    before: dict[str, str] = lock.get("pins", {})
    text = path.read_text() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_pins(path, lock, {})
    try:
        now = dict(build_graph(config, home).pins)
        _write_pins(path, lock, now)
    except BaseException:
        if text is None:
            path.unlink()
        else:
            write_whole(path, text)
        raise
    for name, value in sorted(now.items()):
        old = before.get(name)
        change = f"{value} as before" if old == value else f"{old} → {value}" if old else value
        sys.stdout.write(f"{name}: {change}\n")
    if not now:
        sys.stdout.write(f"{config.name}: the run file has nothing to pin\n")


def _write_pins(path: Path, lock: Mapping[str, Any], pins: Mapping[str, str]) -> None:
    write_whole(path, json.dumps({"nodes": {}, **lock, "pins": dict(pins)}, indent=1, sort_keys=True))
