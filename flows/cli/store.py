"""The commands that read the store, which `flows.cli.checkpoints` declares."""

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from base.store.checkpoint import Store, write_whole


def lineage(name: str, home: Path, *, form: str, html: Path | None) -> None:
    """Print a checkpoint's lineage (`text`, `mermaid`, `json`, `html`), or draw it into a file."""
    from flows.lineage.drawing import draw_html
    from flows.lineage.mermaid import mermaid
    from flows.lineage.rows import resolve, rows, tree

    store = Store(home)
    if html is not None:
        write_whole(html, draw_html(store, resolve(store, name), name))
        sys.stdout.write(f"{html}\n")
    elif form == "html":
        sys.stdout.write(draw_html(store, resolve(store, name), name) + "\n")
    elif form == "json":
        found = rows(store, resolve(store, name))
        sys.stdout.write(json.dumps([dataclasses.asdict(row) for row in found], indent=1) + "\n")
    elif form == "mermaid":
        sys.stdout.write(mermaid(rows(store, resolve(store, name))) + "\n")
    else:
        Console().print(tree(store, name))


def diff(a: str, b: str, home: Path, *, as_json: bool) -> None:
    """Print what differs between two checkpoints."""
    from flows.lineage.differences import as_lines, as_mapping, score_table
    from flows.lineage.rows import resolve_one

    store = Store(home)
    one, other = resolve_one(store, a), resolve_one(store, b)
    if as_json:
        sys.stdout.write(json.dumps(as_mapping(one, other, store), indent=1, default=str) + "\n")
    elif one.key == other.key:
        sys.stdout.write(f"{a} and {b} are the same checkpoint: {one.name} (key {one.key})\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in as_lines(one, other, store)))
        if (table := score_table(one, other, store)) is not None:
            Console().print(table)


def gc(home: Path, *, yes: bool, days: float, corrupted: bool, as_json: bool) -> None:
    """Print what can be removed, and with `yes` remove it."""
    from flows.tracking.gc import check_home, find_garbage, plan_lock, registered_keys, remove

    check_home(home)
    store = Store(home)
    with plan_lock(store):
        garbage = find_garbage(store, registered_keys(store), days, corrupted=corrupted)
        freed, stayed = remove(store, garbage) if yes else (0, [])
    total = sum(each.size for each in garbage)
    if as_json:
        found = [dataclasses.asdict(each) | {"path": str(each.path)} for each in garbage]
        sys.stdout.write(
            json.dumps({"found": found, "bytes": total, "freed": freed, "stayed": stayed}, indent=1) + "\n"
        )
        return
    for each in garbage:
        sys.stdout.write(f"{decimal(each.size):>10}  {each.kind:<11}  {each.name}  {each.key}\n")
    if not garbage:
        sys.stdout.write("nothing to remove\n")
    elif not yes:
        sys.stdout.write(f"{decimal(total)} in {len(garbage)} artifacts can be removed; --yes removes them\n")
    else:
        sys.stdout.write("".join(f"stayed: {line}\n" for line in stayed) + f"{decimal(freed)} freed\n")
