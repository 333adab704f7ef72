"""What a model card says beside the lineage: the base, an example prompt, intervals, and what the gate decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from base.errors import UserError
from base.store.checkpoint import Artifact, Store
from evals.comparison.scores import Scores, read_scores
from evals.report.export import DATA_FILE
from evals.statistics.interval import Interval
from evals.statistics.intervals import mean_interval
from evals.tables.markdown import code, plain
from flows.lineage.rows import Row
from flows.plan.champion_history import read_history
from flows.plan.lock import lock_path
from flows.plan.state_files import CHAMPION_FILE, read_json
from stages.config.kinds import SCORINGS

CONFIDENCE = 0.95
MARKS = {True: "met", False: "failed", None: "not compared"}


@dataclass(frozen=True)
class CardFacts:
    """What the store and its runs know of a checkpoint.

    Attributes:
        intervals: (content key, `domain/split`) -> greedy score with its interval over examples.
        verdict: What became of it in its runs, a Markdown line each.
        contamination: (content key, `domain/split`) -> how many of the examples have a copy in the training data.
    """

    intervals: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    verdict: Sequence[str] = ()
    contamination: Mapping[tuple[str, str], str] = field(default_factory=dict)


NO_FACTS = CardFacts()


def facts_of(store: Store, artifact: Artifact, lineage: Sequence[Row]) -> CardFacts:
    """Read the score sheets of a checkpoint and its ancestors, and what the runs of the home decided about it."""
    sheets = _sheets(store, {row.key for row in lineage})
    return CardFacts(
        {place: mean_interval(sheet.greedy_G, CONFIDENCE) for place, sheet in sheets.items()},
        _verdicts(store, artifact),
        {place: sheet.contamination for place, sheet in sheets.items()},
    )


def _sheets(store: Store, keys: set[str]) -> dict[tuple[str, str], Scores]:
    found = {}
    for artifact in store.artifacts():
        parent = artifact.manifest.get("parents", {}).get("checkpoint", {}).get("key")
        if artifact.manifest.get("stage") not in SCORINGS or parent not in keys:
            continue
        domain, split = (str(artifact.manifest["config"][name]) for name in ("domain", "split"))
        try:
            found[parent, f"{domain}/{split}"] = read_scores(artifact.path, domain, split)
        except UserError:
            # A sheet of another release has a score in its manifest all the same.
            continue
    return found


def _verdicts(store: Store, artifact: Artifact) -> list[str]:
    lines = []
    runs = sorted({path.parent.name for path in (store.home / "runs").glob(f"*/{CHAMPION_FILE}")} | _reported(store))
    for run in runs:
        history = read_history(store, run)
        reigns = [reign for reign in history if reign.student == artifact.key]
        if reigns:
            now = "Champion" if history[-1].student == artifact.key else "Was champion"
            lines.append(f"- {now} of run {code(run)} since {plain(reigns[-1].since)}.")
        report = read_json(lock_path(store.home, run).with_name(DATA_FILE))
        verdict = report.get("verdict") or {}
        nodes = read_json(lock_path(store.home, run)).get("nodes", {})
        candidate = nodes.get(f"{verdict.get('candidate')}@{next(iter(report.get('seeds', [])), 0)}", {})
        if candidate.get("key") == artifact.key:
            lines.append(f"- Gate of run {code(run)}: {plain(verdict['conclusion'])}.")
            lines += [
                f"  - {MARKS[one['passed']]}: {plain(one['name'])}: {plain(one['text'])}" for one in verdict["criteria"]
            ]
    return lines


def _reported(store: Store) -> set[str]:
    return {path.parent.name for path in (store.home / "runs").glob(f"*/{DATA_FILE}")}


def base_of(lineage: Sequence[Row]) -> str:
    """What all of a lineage began with, in words; empty where it is not known."""
    for row in lineage:
        if row.stage == "pretrain":
            return f"pretrained from scratch by this pipeline ({row.tokens:,} tokens)"
        if row.stage == "load" and not row.parents:
            source = row.config
            place, revision = str(source.get("location", "")), source.get("revision")
            if source.get("kind") == "hub":
                return code(place) + (f" at revision {code(str(revision))}" if revision else "")
            # A folder's place on one machine says nothing on another.
            return f"{code(Path(place).name)}, imported ({source.get('kind', 'checkpoint')})"
    return ""


def example_prompt(artifact: Artifact) -> tuple[str, str] | None:
    """A prompt the checkpoint was trained on with its gold answer; None where its manifest shows none."""
    for shown in artifact.manifest.get("examples", {}).values():
        for each in shown:
            return str(each["prompt"]), str(each["answer"])
    return None
