"""Descriptions of configs, checkpoints and data for the tracking store: flat names, Markdown notes. Free of mlflow."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from base.store.checkpoint import Artifact
from evals.tables.templates import text
from stages.rows.trained_on import FACT

DIGEST_LENGTH = 16
TEACHER_DIGEST_LENGTH = 12
DATA_FILE = "data.json"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config values as dotted keys; absent ones (None, an empty mapping) are left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif value is not None:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def metric_name(name: str) -> str:
    """A name that the tracking store accepts: forbidden characters become underscores."""
    return re.sub(r"[^\w\-. /]", "_", name)


def model_name(artifact: Artifact) -> str:
    """A checkpoint's name among LoggedModels, which allow no slashes."""
    stem = re.sub(r"[^\w\-]", "-", artifact.name)
    return f"{stem}-seed{artifact.manifest.get('seed', 0)}"


def dataset_digest(fingerprint: str) -> str:
    """A domain's fingerprint as a dataset digest, which has at most 36 characters."""
    return fingerprint[:DIGEST_LENGTH]


def model_params(artifact: Artifact) -> dict[str, str]:
    """The parameters on a checkpoint's page: its location, its kind, and how it was made."""
    manifest = artifact.manifest
    facts = {
        name: manifest[name]
        for name in ("stage", "seed", "tokens", "seconds", "device_seconds", "joules", "code")
        if name in manifest
    }
    identity = {"uri": artifact.uri, "digest": artifact.digest, "key": artifact.key}
    taught = {
        metric_name(f"teachers.{entry['domain']}.{entry['teacher'].rpartition('/')[2]}"): lesson(entry)
        for entry in manifest.get("teachers", [])
    }
    record = {"contamination": unrecorded(manifest)} if unrecorded(manifest) else {}
    return flatten({**identity, **facts, **taught, **record, "config": manifest.get("config", {})})


def unrecorded(manifest: Mapping[str, Any]) -> str:
    """Why copies of held-out prompts in a checkpoint's training data are unknown; empty if all of it is recorded."""
    facts = manifest.get(FACT)
    if facts is None:
        return "unknown: its training data are not recorded"
    return f"unknown: the training data of {', '.join(facts['unknown'])} are not recorded" if facts["unknown"] else ""


def lesson(entry: Mapping[str, Any]) -> str:
    """A domain's teacher in words: its name and digest, the objective, its weight and share.

    Args:
        entry: An entry of a student manifest's `teachers`.
    """
    facts = [entry["teacher"], f"digest {entry['digest'][:TEACHER_DIGEST_LENGTH]}"]
    facts += [f"objective {entry['objective']['type']}", f"weight {entry['weight']:.3g}"]
    return ", ".join([*facts, f"{entry['prompt_share']:.1%} of the prompts"])


@dataclass(frozen=True)
class About:
    """Facts about a checkpoint in the tracking store, besides its manifest.

    Attributes:
        pages: role -> address of the parent's page; absent for a parent that the tracking store does not have.
        scores: (domain, split) -> greedy score; empty until it is evaluated.
        children: Name and address of each checkpoint that was made from it.
        curves: domain -> address of the chart of its scores while it was trained.
        rows: Scores beside those of teacher and start, as in `evals.comparison.headline.Compared`; for merges only.
        verdict: The gate's verdict on it; empty if it was not the candidate.
        title: The run that compared it.
        run: The address of that run's page.
        report: The address of that run's report; empty if there is none.
    """

    pages: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[tuple[str, str], float] = field(default_factory=dict)
    children: Sequence[tuple[str, str]] = ()
    curves: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    verdict: str = ""
    title: str = ""
    run: str = ""
    report: str = ""


def model_note(artifact: Artifact, about: About) -> str:
    """A checkpoint's description: kind, scores, parents and children, each with its link."""
    return text(
        "flows.lineage",
        "model_note.md",
        artifact=artifact,
        manifest=artifact.manifest,
        about=about,
        percent=lambda share: "" if share is None else f"{100 * share:.1f}",
        lesson=lesson,
        unrecorded=unrecorded(artifact.manifest),
        cost=_cost(artifact.manifest),
        length=DIGEST_LENGTH,
        data_file=DATA_FILE,
    )


def _cost(manifest: Mapping[str, Any]) -> str:
    """Time, tokens and energy, if they are recorded."""
    units = {"seconds": "s", "device_seconds": "device-seconds", "tokens": "tokens", "joules": "J"}
    return ", ".join(f"{manifest[name]:,.0f} {unit}" for name, unit in units.items() if manifest.get(name) is not None)


def run_note(rows: Sequence[tuple[Artifact, str]], flow_run: str = "", charts: Mapping[str, str] | None = None) -> str:
    """A run's description: its checkpoints, each with a link to its page.

    Args:
        rows: A checkpoint and the address of its page, parents first.
        flow_run: Address of the flow run in Prefect's pages.
        charts: Subject of a chart -> its address: scores over time beside those of teacher and start.
    """
    shown = {"rows": rows, "flow_run": flow_run, "charts": charts, "length": DIGEST_LENGTH}
    return text("flows.lineage", "run_note.md", **shown)


def sample_table(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A journal's sample records as MLflow's table: `columns` and rows of `data`, all rows of equal length."""
    columns = list(dict.fromkeys(name for sample in samples for name in sample if name not in ("kind", "time")))
    return {"columns": columns, "data": [[_cell(sample.get(name)) for name in columns] for sample in samples]}


def data_table(artifact: Artifact) -> dict[str, list[Any]]:
    """A sample of a checkpoint's training data as MLflow's table; no rows if its manifest has none."""
    drawn = artifact.manifest.get("examples", {})
    rows = [[domain, each["prompt"], each["answer"]] for domain, shown in drawn.items() for each in shown]
    return {"columns": ["domain", "prompt", "answer"], "data": rows}


def _cell(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, (str, int, float, bool)) else json.dumps(value)
