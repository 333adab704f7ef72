"""The champion of a run: the present one, its history, and promotion by a person. Free of prefect and mlflow.

The file is authoritative; the alias in MLflow follows it. A person's decision has precedence: the gate does not promote
a checkpoint that a person decided against, only one made since.
"""

import dataclasses
import json
import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from base.errors import UserError, nearest
from base.store.checkpoint import Store, write_whole
from experts.domain import HELD_OUT
from flows.champion.tries import try_number
from flows.plan.champion_history import By, ChampionRecord, champion_path, iso_seconds, read_history
from flows.plan.nodes import Node, StageGraph
from flows.run_file.schema import BASELINES, STUDENT, VARIANTS
from flows.tracking.aliases import alias_operations

if TYPE_CHECKING:
    from evals.comparison.results import Results
    from evals.comparison.scores import Scores
    from evals.promotion.gate import GateVerdict


def champion_scores(store: Store, history: Sequence[ChampionRecord]) -> "dict[str, Scores] | None":
    """domain -> held-out sheet of the present champion; None where there is no champion."""
    return _sheets(store, history[-1]) if history else None


def former_scores(
    store: Store, history: Sequence[ChampionRecord], but: Collection[str]
) -> "dict[str, dict[str, Scores]]":
    """Former champions -> their sheets; without the keys `but` and those that a person decided against."""
    left_out = {*but, *rejected(history), *(record.student for record in history[-1:])}
    before = {record.student: record for record in history if record.student not in left_out}
    found = {f"{record.node} of {record.when}": _sheets(store, record) for record in before.values()}
    return {name: sheets for name, sheets in found.items() if sheets}


def _sheets(store: Store, record: ChampionRecord) -> "dict[str, Scores]":
    from evals.comparison.scores import read_scores

    found = {domain: store.find(key) for domain, key in record.scores.items()}
    return {domain: read_scores(sheet.path, domain, HELD_OUT) for domain, sheet in found.items() if sheet}


def rejected(history: Sequence[ChampionRecord]) -> dict[str, ChampionRecord]:
    """Content keys that a person decided against and has not promoted since -> that decision."""
    standing: dict[str, ChampionRecord] = {}
    for record in history:
        if record.by == "person":
            standing |= dict.fromkeys(record.against, record)
            standing.pop(record.student, None)
    return standing


def judge_run(graph: StageGraph, store: Store, results: "Results") -> "GateVerdict":
    """The gate's verdict on the run's merges, including earlier decisions of a person.

    Raises:
        UserError: a score sheet of the champion is malformed.
    """
    from evals.promotion.gate import judge

    gate, history = graph.config.gate, read_history(store, graph.config.name)
    now = history[-1] if history else None
    champion_name = next((node.name for node in merges_of(graph) if now and node.key == now.student), "")
    former = former_scores(store, history, [node.key for node in merges_of(graph)])
    verdict = judge(
        results,
        gate.non_inferiority_margin,
        gate.max_forgetting,
        champion_scores(store, history),
        champion_name,
        former,
        try_number(store, results, first_of(graph, STUDENT).key),
    )
    if now and verdict.candidate == champion_name:
        return dataclasses.replace(verdict, reigns=now.since)
    decision = rejected(history).get(first_of(graph, verdict.candidate).key)
    if decision is None or not verdict.passed:
        return verdict
    withheld = (
        f"a person chose {decision.node} instead, {decision.when}: {decision.reason}; `mopd promote` overrides this"
    )
    return dataclasses.replace(verdict, withheld=withheld)


def merges_of(graph: StageGraph) -> list[Node]:
    """The merges of the first seed, the only ones that can become champion, in the graph's order."""
    seed = graph.config.seeds[0]
    names = [node for node in graph.checkpoints if node.name == STUDENT or node.name.startswith((BASELINES, VARIANTS))]
    return [node for node in names if node.seed == seed]


def first_of(graph: StageGraph, name: str) -> Node:
    """The node of this name that can become champion: the first seed's."""
    return next(node for node in graph.checkpoints if node.name == name)


def promote_by_gate(graph: StageGraph, store: Store, verdict: "GateVerdict") -> bool:
    """Make the candidate champion if it passes the gate.

    Returns:
        Whether the champion changed.
    """
    if not verdict.promoted:
        return False
    node, run = first_of(graph, verdict.candidate), graph.config.name
    with store.lock(f"champion-{run}"):
        history = read_history(store, run)
        # A person may have decided since the verdict.
        if (history and history[-1].student == node.key) or node.key in rejected(history):
            return False
        _write(store, run, [*history, _record_of(graph, node, "gate", f"passed the gate; {verdict.why}")])
    return True


def promote(graph: StageGraph, store: Store, name: str | None, reason: str) -> None:
    """Make a merge of the run champion regardless of the gate, and print it; a repetition changes nothing.

    Args:
        graph: The run.
        store: Where its artifacts are.
        name: A merge by node name (the first seed's) or id, or a former champion by content key; the run's candidate
            when None.
        reason: Why, for the history.

    Raises:
        UserError: there is no such merge, it is not made or not evaluated yet, or the reason is empty.
    """
    run = graph.config.name
    if not reason.strip():
        raise UserError("--reason: give a reason, for the champion's history")
    candidate = _candidate(graph, store)
    with store.lock(f"champion-{run}"):
        history = read_history(store, run)
        now = history[-1] if history else None
        former = next((record for record in history if record.student == name), None)
        if former is not None:
            chosen = _again(store, former, reason, "promote")
        else:
            chosen = _record_of(graph, _chosen(graph, store, name or candidate.id), "person", reason)
        if changed := now is None or now.student != chosen.student:
            _write(store, run, [*history, _against(chosen, now, candidate, store)])
    before = f"; before: {now}" if now and changed else ""
    _print(f"{run}: {chosen} is champion{before}" if changed else f"{run}: {chosen} is champion already")
    update_aliases(store, run)


def rollback(graph: StageGraph, store: Store) -> None:
    """Restore the champion before the present one, and print it; a repetition changes nothing.

    Raises:
        UserError: there is no former champion, or its checkpoint is gone.
    """
    run = graph.config.name
    candidate = _candidate(graph, store)
    with store.lock(f"champion-{run}"):
        history = read_history(store, run)
        if len(history) < 2:
            what = f"{history[-1]} is its first champion" if history else "it has no champion yet"
            raise UserError(f"{run}: {what}; there is no earlier champion to roll back to")
        now = history[-1]
        if changed := now.action != "rollback":
            back = _again(store, history[-2], f"rolled back from {now}", "rollback")
            _write(store, run, [*history, _against(back, now, candidate, store)])
    if changed:
        _print(f"{run}: {back} is champion again; rolled back from {now}")
    else:
        _print(f"{run}: already rolled back to {now}; to go further back, run mopd promote RUN.yaml KEY with one of:")
        for record in history:
            _print(f"  {record.student}  {record.node}, {record.decision}")
    update_aliases(store, run)


def update_aliases(store: Store, run: str, candidate: Node | None = None) -> None:
    """Move the aliases of the registered model; the run's next start sends what MLflow does not accept now."""
    send_operations(store, run, alias_operations(run, candidate))


def send_operations(store: Store, run: str, operations: Sequence[Mapping[str, Any]]) -> None:
    """Send operations to MLflow outside of a run; what it does not take now, the run's next start sends."""
    from flows.servers.start import without_secrets
    from flows.tracking.outbox import Outbox, send_left_over
    from flows.tracking.writer import Writer, unsent_folder

    writer, folder = Writer(store), unsent_folder(store.home, run)
    unsent = send_left_over(folder, writer)
    outbox = Outbox(folder / f"{uuid.uuid4().hex}.jsonl", writer)
    for operation in operations:
        outbox.submit(operation)
    if unsent + outbox.close():
        sys.stderr.write(
            f"warning: MLflow at {without_secrets(writer.uri)} could not be reached, so its aliases are unchanged. The "
            f"operations are kept in {folder}; this command, repeated, or the next run of {run} sends them\n"
        )


def send_kept(store: Store, run: str) -> None:
    """Send operations of earlier runs of this name that MLflow has not accepted; else mlflow is not imported."""
    from flows.servers.start import without_secrets
    from flows.tracking.outbox import send_left_over
    from flows.tracking.writer import Writer, unsent_folder

    folder = unsent_folder(store.home, run)
    if not any(folder.glob("*.jsonl")):
        return
    writer = Writer(store)
    if send_left_over(folder, writer):
        sys.stderr.write(
            f"warning: MLflow at {without_secrets(writer.uri)} could not be reached; "
            f"the unsent changes are kept in {folder}\n"
        )


def _candidate(graph: StageGraph, store: Store) -> Node:
    from flows.champion.results import collect

    if graph.config.merge is None:
        raise UserError(f"{graph.config.name}: this run has no merge, so it has no champion")
    return first_of(graph, judge_run(graph, store, collect(graph, store)).candidate)


def _chosen(graph: StageGraph, store: Store, name: str) -> Node:
    """The merge with this name or id, if it is made and evaluated."""
    merges = [n for n in graph.checkpoints if n.name == STUDENT or n.name.startswith((BASELINES, VARIANTS))]
    node = next((node for node in merges if name in (node.name, node.id)), None)
    if node is None:
        names = {node.name for node in merges} | ({node.id for node in merges} if "@" in name else set())
        raise UserError(f"{graph.config.name}: '{name}' is not a merge of this run{nearest(name, names)}")
    missing = [other.id for other in (node, *graph.evaluations(node.id)) if store.find(other.key) is None]
    if missing:
        raise UserError(f"{graph.config.name}: {', '.join(missing)}: not finished; `mopd run` makes the missing parts")
    return node


def _record_of(graph: StageGraph, node: Node, by: By, reason: str) -> ChampionRecord:
    sheets = [sheet for sheet in graph.evaluations(node.id) if sheet.config["split"] == HELD_OUT]
    scores = {str(sheet.config["domain"]): sheet.key for sheet in sheets}
    return ChampionRecord(node.key, node.id, scores, iso_seconds(datetime.now(UTC)), by, reason)


def _again(store: Store, former: ChampionRecord, reason: str, action: Literal["promote", "rollback"]) -> ChampionRecord:
    """The new record of a former champion, by a person."""
    if store.find(former.student) is None:
        raise UserError(f"{former}: this former champion is no longer in {store.root}")
    when = iso_seconds(datetime.now(UTC))
    return ChampionRecord(former.student, former.node, former.scores, when, "person", reason, action)


def _against(chosen: ChampionRecord, now: ChampionRecord | None, candidate: Node, store: Store) -> ChampionRecord:
    """A person's choice, with the checkpoints it was made against."""
    others = [now.student] if now else []
    others += [candidate.key] if store.find(candidate.key) else []
    return dataclasses.replace(chosen, against=tuple(key for key in dict.fromkeys(others) if key != chosen.student))


def _write(store: Store, run: str, history: Sequence[ChampionRecord]) -> None:
    path = champion_path(store, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"history": [dataclasses.asdict(record) for record in history]}, indent=1))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
