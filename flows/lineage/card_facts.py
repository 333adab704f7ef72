"""The facts of a model card besides the lineage: base, example prompt, intervals, and the gate's verdict."""

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
    """Facts about a checkpoint from the store and its runs.

    Attributes:
        intervals: (content key, `domain/split`) -> greedy score with its interval over examples.
        verdict: The verdicts on it in its runs, one Markdown line each.
        contamination: (content key, `domain/split`) -> the share of examples with a copy in the training data, in
            words.
    """

    intervals: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    verdict: Sequence[str] = ()
    contamination: Mapping[tuple[str, str], str] = field(default_factory=dict)


NO_FACTS = CardFacts()


def facts_of(store: Store, artifact: Artifact, lineage: Sequence[Row]) -> CardFacts:
    """Read the score sheets of a checkpoint and its ancestors, and the verdicts on it in the home's runs."""
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
            # The manifest has the score also of a sheet that another release wrote.
            continue
    return found


def _verdicts(store: Store, artifact: Artifact) -> list[str]:
    lines = []
    runs = sorted({path.parent.name for path in (store.home / "runs").glob(f"*/{CHAMPION_FILE}")} | _reported(store))
    for run in runs:
        history = read_history(store, run)
        records = [record for record in history if record.student == artifact.key]
        if records:
            now = "Champion" if history[-1].student == artifact.key else "Was champion"
            lines.append(f"- {now} of run {code(run)} since {plain(records[-1].since)}.")
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
    """The first checkpoint of a lineage, in words; empty if it is unknown."""
    for row in lineage:
        if row.stage == "pretrain":
            return f"pretrained from scratch by this pipeline ({row.tokens:,} tokens)"
        if row.stage == "load" and not row.parents:
            source = row.config
            place, revision = str(source.get("location", "")), source.get("revision")
            if source.get("kind") == "hub":
                return code(place) + (f" at revision {code(str(revision))}" if revision else "")
            # A folder's path is meaningless on another machine.
            return f"{code(Path(place).name)}, imported ({source.get('kind', 'checkpoint')})"
    return ""


def example_prompt(artifact: Artifact) -> tuple[str, str] | None:
    """A prompt that the checkpoint was trained on, with its gold answer; None if its manifest has none."""
    for shown in artifact.manifest.get("examples", {}).values():
        for each in shown:
            return str(each["prompt"]), str(each["answer"])
    return None
