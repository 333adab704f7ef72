"""What the commands of `mopd` do; `flows.cli` declares them. Heavy imports wait until they are needed."""

import errno
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from evals.power import margin_notes, precision_notes
from experts.errors import UserError
from flows.champion_start import pin_note, savings
from flows.config import RunConfig
from flows.estimate import Estimate, estimate, summary
from flows.lock import NodeStatus
from flows.lock import status as node_status
from flows.plan import EVALUATIONS, Node, StageGraph, build_graph
from flows.run_file import load_run_file, schema_keys
from flows.shifts import COSINES, SHIFT
from flows.signals import interruptible
from flows.starts import close_killed
from stages.core.checkpoint import CorruptedArtifactError, Store
from stages.core.journal import JOURNAL_FILE, read

if TYPE_CHECKING:
    from flows.closing import Outcome
    from flows.pipeline import PipelineFailedError

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
SHORT_KEY = 10
# Less than this, and a database can no longer write a page.
NOTHING_FREE_BYTES = 2**20


@dataclass(frozen=True)
class Asked:
    """Which run is meant.

    Attributes:
        file: The run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        home: `$MOPD_HOME`.
    """

    file: Path
    overrides: tuple[str, ...]
    max_steps: int | None
    home: Path

    def graph(self) -> StageGraph:
        """The run's graph.

        Raises:
            UserError: a mistake in the run file.
        """
        return build_graph(load_run_file(self.file, list(self.overrides), self.max_steps), self.home)

    @property
    def command(self) -> str:
        """The command line that runs it again."""
        words = ["mopd", "run", str(self.file), *self.overrides]
        words += ["--max-steps", str(self.max_steps)] if self.max_steps else []
        return shlex.join([*words, "--home", str(self.home)])


def run(asked: Asked, *, discard_corrupted: bool, plain: bool, verbose: bool) -> int:
    """Make a run; returns the exit code."""
    with interruptible():
        try:
            return _run(asked, discard_corrupted=discard_corrupted, plain=plain, verbose=verbose)
        except KeyboardInterrupt:
            return _stopped(asked)


def _run(asked: Asked, *, discard_corrupted: bool, plain: bool, verbose: bool) -> int:
    console = Console()
    graph, store = asked.graph(), Store(asked.home)
    verify(graph, store, discard_corrupted)
    if all(entry.cached for entry in node_status(graph, store)):
        close_killed(asked.home, graph.config.name)
        console.print("Everything is in the store already; nothing was started.")
        show_outcome(graph, _conclude_cached(graph, store), asked.home, console)
        return DONE
    return _run_pipeline(asked, graph, console, plain=plain, verbose=verbose)


def _conclude_cached(graph: StageGraph, store: Store) -> "Outcome":
    """What a run comes to that makes nothing; it sends what earlier ones could not, or did not live to send."""
    from filelock import Timeout

    from flows.champion import send_kept, tell_mlflow
    from flows.closing import conclude
    from flows.notify import owe_promotions, tell_promotions

    config = graph.config
    owe_promotions(store, config, {})
    outcome = conclude(graph, store, promote=True, rewrite=False)
    if outcome.changed:
        # The gate of today lets pass what that of the last run did not.
        tell_mlflow(store, config.name, outcome.candidate)
    else:
        send_kept(store, config.name)
    lock = store.lock(f"run-{config.name}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        # A run of this name is under way, and tells what is owed at its end.
        return outcome
    try:
        tell_promotions(store, config)
    finally:
        lock.release()
    return outcome


def verify(graph: StageGraph, store: Store, discard_corrupted: bool) -> None:
    """Verify every cached artifact of a run.

    Raises:
        CorruptedArtifactError: names the file; or it is set aside, if that was asked for.
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


def _run_pipeline(asked: Asked, graph: StageGraph, console: Console, *, plain: bool, verbose: bool) -> int:
    from flows.servers import without_secrets
    from flows.session import prefect_session

    for entry in node_status(graph, Store(asked.home)):
        if not entry.cached and entry.node.stage not in EVALUATIONS:
            sys.stderr.write(f"{entry.node.id}: to run ({entry.why})\n")
    sys.stderr.write("starting Prefect …\n")
    with prefect_session(asked.home, verbose) as pages:
        from httpx import HTTPError
        from prefect import tags
        from prefect.exceptions import CancelledRun, PrefectException
        from prefect.states import State

        from flows.orphans import run_tags
        from flows.pipeline import PipelineFailedError, ending, pipeline

        sys.stderr.write(f"Prefect: {pages}\n")
        try:
            with tags(*run_tags(graph.config.name)):
                outcome = pipeline(
                    str(asked.file), list(asked.overrides), asked.max_steps, str(asked.home.resolve()), plain
                )
        except CancelledRun:
            return _stopped(asked)
        except PipelineFailedError as error:
            return _report_failures(error, asked)
        except (PrefectException, HTTPError) as error:
            # What the run came to counts, not whether Prefect could record it.
            match ending():
                case None:
                    return _report_silence(error, asked)
                case PipelineFailedError() as failure:
                    return _report_failures(failure, asked)
                case UserError() as mistake:
                    raise mistake from None
                case State():
                    return _stopped(asked)
                case ended:
                    said = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
                    sys.stderr.write(f"warning: Prefect did not record the end of this run: {said}\n")
                    outcome = cast("Outcome", ended)
    show_outcome(graph, outcome, asked.home, console)
    return DONE


def _stopped(asked: Asked) -> int:
    sys.stderr.write(f"stopped; `{asked.command}` resumes where it was\n")
    return INTERRUPTED


def _report_failures(error: "PipelineFailedError", asked: Asked) -> int:
    from flows.launch import NodeFailedError
    from flows.worker import DISK_FAULT

    mistakes = []
    for job, failure in error.failures.items():
        text = str(failure)
        full = isinstance(failure, OSError) and failure.errno == errno.ENOSPC
        if full or (isinstance(failure, NodeFailedError) and failure.exit_code == DISK_FAULT):
            text = f"the disk of {asked.home} is full or failing: {text}"
        sys.stderr.write(f"error: {text if text.startswith(job) else f'{job}: {text}'}\n")
        mistakes.append(isinstance(failure, UserError) or getattr(failure, "user_error", False))
    if error.not_started:
        sys.stderr.write(f"not started, for they need what failed: {', '.join(error.not_started)}\n")
    sys.stderr.write(f"all else is finished and kept; `{asked.command}` resumes where it was\n")
    return MISTAKE if all(mistakes) else FAILED


def _report_silence(error: Exception, asked: Asked) -> int:
    """Say why Prefect's server does not answer: its database lies in the home, so a full disk ends it first."""
    from flows.servers import without_secrets

    if shutil.disk_usage(asked.home).free < NOTHING_FREE_BYTES:
        cause = f"the disk of {asked.home} is full; free some space"
    else:
        said = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
        cause = f"Prefect's server no longer answers as it should ({said}); its log is in {asked.home}/servers"
    sys.stderr.write(f"error: {cause}\nwhat is finished is kept; `{asked.command}` resumes where it was\n")
    return FAILED


def show_outcome(graph: StageGraph, outcome: "Outcome", home: Path, console: Console) -> None:
    """Print the table of scores, the gate's verdict, and where to read on."""
    from evals.table import render

    console.print(render(outcome.results))
    for line in (*outcome.verdict_lines(), *savings(graph, Store(home))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {outcome.report}", highlight=False, soft_wrap=True)
    for line in pages(home, graph.config.name):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def pages(home: Path, run: str) -> list[str]:
    """Where MLflow's and Prefect's pages are, and the command that serves those which no standing server does."""
    from flows.mlflow_pages import home_page, page_lines
    from flows.servers import without_secrets
    from flows.standing import standing

    tracking, api = os.environ.get("MLFLOW_TRACKING_URI", ""), os.environ.get("PREFECT_API_URL", "")
    # A database is no page: only a server's address is one.
    places = {
        "MLflow": tracking if tracking.startswith("http") else standing(home, "mlflow"),
        "Prefect": api.rstrip("/").removesuffix("/api") or standing(home, "prefect"),
    }
    lines = [f"{name + ':':8} {without_secrets(place)}" for name, place in places.items() if place]
    if tracked := without_secrets(places["MLflow"]).rstrip("/"):
        lines[:1] = [f"MLflow:  {home_page(tracked)}", *page_lines(tracked, home, run)]
    missing = " and ".join(f"{name}'s" for name, place in places.items() if not place)
    return [*lines, f"{missing} pages: mopd ui --home {home}"] if missing else lines


def plan(asked: Asked, *, check: bool, as_json: bool) -> None:
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
            notes = precision_notes(examples, gate.non_inferiority_margin, gate.confidence)
            for line in [*notes, *margin_notes(graph.config.hypotheses, gate.confidence)]:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        missing = [entry.node for entry in entries if not entry.cached]
        for line in [*summary(estimate(graph, store, missing)), *pin_note(graph, store)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if check:
        from flows.check import deep_check
        from flows.memory import needs

        warnings = deep_check(graph, store)
        for need in needs(graph, store, [entry.node for entry in entries if not entry.cached]):
            sys.stderr.write(f"memory: {need}\n")
        for warning in warnings:
            sys.stderr.write(f"warning: {warning}\n")
        sys.stderr.write("check passed: data, tokenizers, memory and disk space\n")


def _plan_entry(entry: NodeStatus, costs: Mapping[str, Estimate]) -> dict[str, Any]:
    """A node for programs; `about_seconds` and `about_tokens` are null where nothing like it was made before."""
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
    yield from (row(node) for node in graph.nodes if node.stage in (SHIFT, COSINES))


def status(asked: Asked, *, as_json: bool = False) -> None:
    """Print how far each training node is, and its last word: what ended the last attempt, or its last note."""
    graph, store = asked.graph(), Store(asked.home)
    found: list[dict[str, Any]] = []
    for entry in node_status(graph, store):
        node = entry.node
        if node.stage in EVALUATIONS:
            continue
        work = store.home / "work" / node.key
        step, total, word = _position(work / JOURNAL_FILE)
        state = "done" if entry.cached else "under way" if _is_locked(store, node.key) else "to run"
        error = work / "error.json"
        if not entry.cached and error.exists():
            word = json.loads(error.read_text())["message"]
        found.append({"node": node.id, "status": state, "step": step, "total": total, "last_word": word})
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    table = Table("stage", "status", "steps", "last word")
    for each in found:
        steps = f"{each['step']}/{each['total']}" if each["total"] else ""
        table.add_row(each["node"], each["status"], steps, each["last_word"])
    Console().print(table)


def _position(journal: Path) -> tuple[int, int, str]:
    """The steps done, of how many, and the last note."""
    step, total, word = 0, 0, ""
    for record in read(journal) if journal.exists() else ():
        if record["kind"] == "progress":
            step, total = record["step"], record["total"]
        elif record["kind"] == "note":
            word = record["text"]
    return step, total, word


def _is_locked(store: Store, key: str) -> bool:
    from filelock import Timeout

    lock = store.lock(key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def report(asked: Asked) -> None:
    """Compare what is finished, print it and write the report."""
    from flows.closing import conclude

    graph, store = asked.graph(), Store(asked.home)
    show_outcome(graph, conclude(graph, store, promote=False), asked.home, Console())


def show_schema(console: Console) -> None:
    """Print every key of a run file with its default and what it means."""
    for key, default, description in schema_keys(RunConfig):
        console.print(f"[bold]{key}[/bold]  [dim]{default}[/dim]\n    {description}", soft_wrap=True, highlight=False)
