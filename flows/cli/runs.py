"""The commands of `mopd` on runs, which `flows.cli.app` declares. Heavy imports are deferred until they are needed."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from base.errors import UserError
from base.exit_codes import DONE, UNPROMOTED
from base.signals import interruptible
from base.store.checkpoint import CorruptedArtifactError, Store
from base.store.journal import JOURNAL_FILE, last_records
from evals.statistics.power import margin_notes, precision_notes
from flows.cli.show import TEXT, Shown, show_outcome
from flows.plan.champion_start import pin_note
from flows.plan.lock import NodeStatus
from flows.plan.lock import status as node_status
from flows.plan.nodes import Node, StageGraph
from flows.plan.state_files import read_json
from flows.run.attended import run_pipeline, stopped
from flows.run.estimate import Estimate, estimate, summary
from flows.run.last_run import remember
from flows.run.run_request import RunRequest
from flows.run.starts import close_killed
from flows.run_file.keys import schema_keys
from flows.run_file.schema import STUDENT, RunConfig
from stages.config.kinds import DISTANCES, EVALUATIONS
from stages.config.roles import is_teacher, taught_domain

if TYPE_CHECKING:
    from flows.run.finish import Outcome

SHORT_KEY = 10


def run(
    asked: RunRequest,
    *,
    discard_corrupted: bool,
    plain: bool,
    verbose: bool,
    require_promotion: bool = False,
    shown: Shown = TEXT,
) -> int:
    """Make a run; returns the exit code.

    Raises:
        UserError: the run file has a mistake, or a promotion is required of a run without a merge.
    """
    with interruptible():
        try:
            graph = asked.graph()
            if require_promotion and graph.config.merge is None:
                raise UserError(f"--require-promotion: {asked.file} has no merge, so nothing can be promoted")
            verify(graph, Store(asked.home), discard_corrupted)
            outcome = _finished(asked, graph, plain=plain, verbose=verbose, quiet=shown.as_json)
        except KeyboardInterrupt:
            return stopped(asked)
        if isinstance(outcome, int):
            return outcome
        show_outcome(graph, outcome, asked.home, Console(), shown)
        return UNPROMOTED if require_promotion and not outcome.crowned else DONE


def _finished(asked: RunRequest, graph: StageGraph, *, plain: bool, verbose: bool, quiet: bool) -> "Outcome | int":
    """The outcome of a run, or the exit code if it did not finish."""
    store = Store(asked.home)
    if not all(entry.cached for entry in node_status(graph, store)):
        return run_pipeline(asked, graph, plain=plain, verbose=verbose)
    close_killed(asked.home, graph.config.name)
    if not quiet:
        sys.stdout.write("Everything is in the store already; nothing was started.\n")
        sys.stdout.flush()
    remember(asked.home, graph.config.name, asked.file, asked.overrides, asked.max_steps)
    return _conclude_cached(graph, store)


def _conclude_cached(graph: StageGraph, store: Store) -> "Outcome":
    """The outcome of a fully cached run; also sends what earlier runs could not send, or were killed before sending."""
    from filelock import Timeout

    from flows.champion.champion import send_kept, update_aliases
    from flows.champion.notify import queue_notifications, send_notifications
    from flows.run.finish import finish_run

    config = graph.config
    queue_notifications(store, config, {})
    outcome = finish_run(graph, store, promote=True, rewrite=False)
    if outcome.changed:
        # Today's gate passes a candidate that the gate of the last run did not.
        update_aliases(store, config.name, outcome.candidate)
    else:
        send_kept(store, config.name)
    lock = store.lock(f"run-{config.name}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        # A run of this name is active, and sends the pending notifications at its end.
        return outcome
    try:
        send_notifications(store, config)
    finally:
        lock.release()
    return outcome


def verify(graph: StageGraph, store: Store, discard_corrupted: bool) -> None:
    """Verify every cached artifact of a run; with `discard_corrupted` set corrupted ones aside.

    Raises:
        CorruptedArtifactError: an artifact is corrupted and not set aside; the message names the file.
    """
    for node in graph.nodes:
        try:
            artifact = store.find(node.key)
            if artifact is not None:
                store.verify(artifact)
        except CorruptedArtifactError as error:
            if not discard_corrupted:
                raise
            sys.stderr.write(f"{node.id}: corrupted; moved to {store.set_aside(error.key)}\n")


def plan(asked: RunRequest, *, check: bool, as_json: bool, ignore_memory: bool = False) -> None:
    """Print what is cached, what would run, and why."""
    graph, store = asked.graph(), Store(asked.home)
    entries = node_status(graph, store)
    if as_json:
        missing = [entry.node for entry in entries if not entry.cached]
        costs = {each.node: each for each in estimate(graph, store, missing)}
        sys.stdout.write(json.dumps([_plan_entry(entry, costs) for entry in entries], indent=1) + "\n")
    else:
        console = Console()
        table = Table("stage", "status", "why", "key")
        for row in _plan_rows(graph, entries):
            table.add_row(*row)
        console.print(table)
        waiting = sum(not entry.cached for entry in entries)
        console.print(f"{len(entries) - waiting} of {len(entries)} nodes are cached, {waiting} to run.")
        if graph.config.merge:
            gate, examples = graph.config.gate, graph.config.evaluate.examples
            roles = graph.node(f"{STUDENT}@{graph.config.seeds[0]}").parents
            taught = {taught_domain(role) for role in roles if is_teacher(role)}
            notes = precision_notes(examples, gate.non_inferiority_margin, gate.confidence, max(1, len(taught)))
            for line in [*notes, *margin_notes(graph.config.hypotheses, gate.confidence)]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        missing = [entry.node for entry in entries if not entry.cached]
        for line in [*summary(estimate(graph, store, missing)), *pin_note(graph, store)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if check:
        from flows.check.check import deep_check
        from flows.engines.memory import needs

        warnings = deep_check(graph, store, ignore_memory=ignore_memory)
        for need in needs(graph, store, [entry.node for entry in entries if not entry.cached]):
            sys.stderr.write(f"memory: {need}\n")
        for warning in warnings:
            sys.stderr.write(f"warning: {warning}\n")
        sys.stderr.write("check passed: data, tokenizers, memory and disk space\n")


def _plan_entry(entry: NodeStatus, costs: Mapping[str, Estimate]) -> dict[str, Any]:
    """A node for programs; `about_seconds` and `about_tokens` are null if no similar node was made before."""
    node, cost = entry.node, costs.get(entry.node.id)
    return {
        "node": node.id,
        "stage": node.stage,
        "key": node.key,
        "cached": entry.cached,
        "why": entry.why,
        "code_changed": entry.code_changed,
        "parents": dict(node.parents),
        "about_seconds": cost.seconds if cost else 0.0,
        "about_tokens": (cost.tokens if cost.like else None) if cost else 0,
    }


def _plan_rows(graph: StageGraph, entries: list[NodeStatus]) -> Iterator[tuple[str, str, str, str]]:
    """A row for each training node and one for all evaluations of its checkpoint; then the other measurements."""
    by_id = {entry.node.id: entry for entry in entries}

    def row(node: Node) -> tuple[str, str, str, str]:
        entry = by_id[node.id]
        return node.id, "cached" if entry.cached else "to run", entry.why, node.key[:SHORT_KEY]

    for node in graph.checkpoints:
        yield row(node)
        evaluations = [by_id[evaluation.id] for evaluation in graph.evaluations(node.id)]
        if evaluations:
            waiting = [evaluation for evaluation in evaluations if not evaluation.cached]
            state = f"{len(waiting)} of {len(evaluations)} to run" if waiting else "cached"
            reasons = "; ".join(dict.fromkeys(evaluation.why for evaluation in waiting or evaluations))
            yield f"  eval of {node.id}", state, reasons, ""
    yield from (row(node) for node in graph.nodes if node.stage in DISTANCES)


def status(asked: RunRequest, *, as_json: bool = False) -> None:
    """Print each training node's progress, and the error that ended its last attempt or its last note."""
    faults: list[str] = []
    graph, store = asked.graph(faults), Store(asked.home, faults)
    found: list[dict[str, Any]] = []
    for entry in node_status(graph, store, faults):
        node = entry.node
        if node.stage in EVALUATIONS:
            continue
        work = store.home / "work" / node.key
        step, total, word = _position(work / JOURNAL_FILE)
        state = "done" if entry.cached else "under way" if _is_locked(store, node.key) else "to run"
        if not entry.cached:
            word = _ended_by(work / "error.json", faults) or word
        found.append({"node": node.id, "status": state, "step": step, "total": total, "last_word": word})
    _warn(faults)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table("stage", "status", "steps", "last word")
    for each in found:
        steps = f"{each['step']}/{each['total']}" if each["total"] else ""
        table.add_row(each["node"], each["status"], steps, each["last_word"])
    Console().print(table)


def _position(journal: Path) -> tuple[int, int, str]:
    """The number of steps done, the total, and the last note."""
    last = last_records(journal, ("progress", "note"))
    progress, note = last.get("progress", {}), last.get("note", {})
    return progress.get("step", 0), progress.get("total", 0), note.get("text", "")


def _ended_by(path: Path, faults: list[str]) -> str:
    """The error that ended a node's last attempt; empty if there is none."""
    try:
        return str(read_json(path).get("message", ""))
    except UserError as error:
        faults.append(str(error))
        return ""


def _warn(lines: Iterable[str]) -> None:
    sys.stderr.write("".join(f"warning: {line}\n" for line in lines))


def _is_locked(store: Store, key: str) -> bool:
    from filelock import Timeout

    lock = store.lock(key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def report(asked: RunRequest, shown: Shown = TEXT) -> None:
    """Compare the finished checkpoints, print the comparison and write the report."""
    from flows.run.finish import finish_run
    from flows.run.run_settings import command_line

    faults: list[str] = []
    graph, store = asked.graph(faults), Store(asked.home, faults)
    command = command_line(asked.file, asked.overrides, asked.max_steps)
    outcome = finish_run(graph, store, promote=False, command=command, faults=faults)
    _warn(faults)
    show_outcome(graph, outcome, asked.home, Console(), shown)


def show_schema(console: Console) -> None:
    """Print every key of a run file with its default and its meaning."""
    for key, default, description in schema_keys(RunConfig):
        console.print(f"[bold]{key}[/bold]  [dim]{default}[/dim]\n    {description}", soft_wrap=True, highlight=False)
