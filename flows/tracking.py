"""What a run tells MLflow: runs, metrics, checkpoints with their parents, the registered student.

One parent run for each pipeline run and a child run for each stage that trained; a cached stage is linked, not
repeated. An evaluation has no run of its own, there would be too many: its metrics go onto the LoggedModel it scores,
each with its dataset. Everything said is an operation in the outbox (`flows.outbox`), which `flows.mlflow_writer`
says to MLflow: threads may speak at will, and a server that cannot be reached neither stops a run nor loses a word.
"""

import getpass
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experts.domain import TRAIN, stable_hash
from flows import cards, lineage
from flows.champion import operations, registered_name
from flows.config import STUDENT
from flows.lock import code_fingerprint, lock_path
from flows.mlflow_writer import TAG_LENGTH, Writer, unsent_folder
from flows.outbox import Outbox, send_left_over
from flows.plan import EVALUATIONS, Node, StageGraph
from flows.servers import MLFLOW_PORT, local_url, mlflow_run_page, without_secrets
from flows.shifts import SHIFT
from flows.standing import standing
from stages.core.checkpoint import Artifact, Store

if TYPE_CHECKING:
    from evals.results import Results

BATCH_METRICS, BATCH_PARAMS, PARAM_LENGTH = 1000, 100, 6000
NOTES, STOPPED_EARLY = "notes", "stopped_early"
PARENT = "run"
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """One pipeline run in MLflow. Its methods may be called from several threads.

    Attributes:
        name: Name of the run.
        store: Where the artifacts are.
        page: Address of the flow run in Prefect's pages; empty where there is none.
    """

    def __init__(self, graph: StageGraph, home: Path) -> None:
        self.name = graph.config.name
        self.store = Store(home)
        self.graph = graph
        self.page = ""
        self.writer = Writer(self.store)
        self.token = uuid.uuid4().hex
        self._known: dict[str, Artifact] = {}
        folder = unsent_folder(home, self.name)
        send_left_over(folder, self.writer)
        self.outbox = Outbox(folder / f"{self.token}.jsonl", self.writer)

    @classmethod
    def start(cls, graph: StageGraph, home: Path, run_file: str, page: str = "") -> "Tracker":
        """Open the parent run, after sending what earlier runs of this name could not.

        Args:
            graph: The planned run.
            home: `$MOPD_HOME`.
            run_file: The run file's text.
            page: Address of the flow run in Prefect's pages.
        """
        tracker = cls(graph, home)
        config = graph.config
        tags = {"name": config.name, "seeds": json.dumps(config.seeds), "code": code_fingerprint()}
        if page:
            tracker.page, tags["prefect"] = page, page
        tracker.open_run(PARENT, config.name, None, tags, config.model_dump(mode="json"))
        tracker.submit("text", ref=PARENT, file="run.yaml", text=run_file)
        lock = lock_path(home, config.name)
        if lock.exists():
            tracker.submit("text", ref=PARENT, file="lock.json", text=lock.read_text())
        return tracker

    @property
    def run_id(self) -> str:
        """MLflow's id of the parent run; empty while the server has not been reached."""
        return self.outbox.ids.get(PARENT, "")

    @property
    def url(self) -> str:
        """Where the parent run can be read, and how; empty while the server has not been reached."""
        if not self.run_id:
            return ""
        if self.writer.uri.startswith("http"):
            return mlflow_run_page(without_secrets(self.writer.uri).rstrip("/"), self.writer.experiment, self.run_id)
        if served := standing(self.store.home, "mlflow"):
            return mlflow_run_page(served, self.writer.experiment, self.run_id)
        return f"{mlflow_run_page(local_url(MLFLOW_PORT), self.writer.experiment, self.run_id)} (after `mopd ui`)"

    @property
    def unsent(self) -> int:
        """Operations the server has not taken; after `finish`, they lie in the run's `unsent` folder."""
        return self.outbox.unsent

    def stage_started(self, node: Node) -> "StageRun":
        """Open the child run of a stage and log the data it draws from; an evaluation opens none."""
        if node.stage in EVALUATIONS:
            return EvaluationRun(self, node)
        tags = {"key": node.key, "stage": node.stage, "seed": str(node.seed), "node": node.id}
        self.open_run(node.id, node.id, PARENT, tags, {"seed": node.seed, **node.config})
        if node.domains:
            datasets = [describe_data(node, domain, TRAIN) for domain in node.domains]
            self.submit("datasets", ref=node.id, datasets=datasets)
        return StageRun(self, node)

    def stage_cached(self, node: Node, artifact: Artifact) -> None:
        """Link what an earlier run made: its LoggedModel becomes an input of the parent run."""
        if node.stage in EVALUATIONS:
            self.scored(node, artifact)
            return
        self.submit("used", ref=PARENT, key=artifact.key)
        self.register(node, artifact)

    def finish(
        self, status: Status, results: "Results | None", report: Path | None, candidate: Node | None = None
    ) -> None:
        """Log the run's results and close it; what the server did not take is sent at the next start.

        Args:
            status: How the run ended.
            results: The comparison of base, teachers and student.
            report: The HTML report; the data it links to stands beside it.
            candidate: The merge the gate judged: it gets the alias `candidate`; `champion` goes to whoever is.
        """
        if results is not None:
            from evals.results import metrics

            self.log_metrics(PARENT, [(name, value, now(), 0) for name, value in metrics(results).items()])
        made = [node.key for node in self.graph.checkpoints if self.store.find(node.key)]
        pages = {"lineage.html": lineage.draw_html(self.store, made, self.name)} if made else {}
        if report is not None:
            from evals.export import DATA_FILE, SCORES_FILE

            pages[report.name] = report.read_text()
            for file in (SCORES_FILE, DATA_FILE):
                self.submit("text", ref=PARENT, file=file, text=report.with_name(file).read_text())
        students = {node.key for node in self.graph.checkpoints if node.name == STUDENT and node.id in self._known}
        if candidate is not None:
            for operation in operations(self.name, candidate):
                self.outbox.submit(operation)
            students.add(candidate.key)
        for file, text in pages.items():
            self.submit("text", ref=PARENT, file=file, text=text)
            for key in sorted(students):
                self.submit("model_text", key=key, file=file, text=text)
        self.submit("note", ref=PARENT, keys=made, page=self.page)
        self.submit("end", ref=PARENT, status=status, time=now())
        self.outbox.close()

    def submit(self, op: str, **fields: Any) -> None:
        """Say one operation, now or when the server can be reached."""
        self.outbox.submit({"op": op, **fields})

    def open_run(
        self, ref: str, name: str, parent: str | None, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> None:
        """Open a run known here as `ref` and log its parameters."""
        everywhere = {"home": str(self.store.home.resolve()), "token": self.token, "name": self.name}
        everywhere |= {"host": os.uname().nodename, "mlflow.user": _user()}
        self.submit("run", ref=ref, name=name, parent=parent, tags={**everywhere, **tags}, time=now())
        flat = list(cards.flatten(params).items())
        for first in range(0, len(flat), BATCH_PARAMS):
            chunk = {name: value[:PARAM_LENGTH] for name, value in flat[first : first + BATCH_PARAMS]}
            self.submit("params", ref=ref, params=chunk)

    def log_metrics(self, ref: str, values: list[tuple[str, float, int, int]]) -> None:
        """Log (name, value, milliseconds, step) on a run, as many as one request takes at a time."""
        named = [(cards.metric_name(name), *rest) for name, *rest in values]
        for first in range(0, len(named), BATCH_METRICS):
            self.submit("metrics", ref=ref, metrics=named[first : first + BATCH_METRICS])

    def scored(self, node: Node, artifact: Artifact) -> None:
        """Put the metrics of a measurement onto the checkpoint it is of, once; one of several is the parent run's."""
        if "checkpoint" not in node.parents:
            return
        if node.stage == SHIFT:
            key, metrics = self.graph.node(node.parents["checkpoint"]).key, artifact.manifest["metrics"]
            named = {cards.metric_name(name): value for name, value in metrics.items()}
            told = {"key": key, "scores": artifact.key, "name": node.stage, "metrics": named}
            self.submit("scores", ref=PARENT, **told, time=now())
            return
        domain, split = node.config["domain"], node.config["split"]
        checkpoint = self.graph.node(node.parents["checkpoint"])
        metrics = {
            cards.metric_name(f"eval/{domain}/{split}/{name}"): value
            for name, value in artifact.manifest["metrics"].items()
        }
        data = describe_data(node, domain, split)
        about = {"key": checkpoint.key, "scores": artifact.key, "data": data}
        self.submit("scores", ref=PARENT, **about, metrics=metrics, time=now())

    def register(self, node: Node, artifact: Artifact) -> None:
        """Make a student's checkpoint a version of the registered model."""
        if node.name != STUDENT:
            return
        self._known[node.id] = artifact
        self.submit("version", name=registered_name(self.name), key=artifact.key, seed=str(node.seed))


class StageRun:
    """The child run of one stage."""

    def __init__(self, tracker: Tracker, node: Node) -> None:
        self.tracker = tracker
        self.node = node
        self._samples: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._position = (0, 0)

    def forward(self, records: list[dict[str, Any]]) -> None:
        """Log a journal's new records: metrics now, notes now as a tag and at the end whole, samples at the end."""
        values = [
            (name, value, int(record["time"] * 1000), record["step"])
            for record in records
            if record["kind"] == "metrics"
            for name, value in record["values"].items()
        ]
        self.tracker.log_metrics(self.node.id, values)
        self._samples += [record for record in records if record["kind"] == "sample"]
        self._position = next(
            ((r["step"], r["total"]) for r in reversed(records) if r["kind"] == "progress"), self._position
        )
        if new := [f"step {record['step']}: {record['text']}" for record in records if record["kind"] == "note"]:
            self._notes += new
            self.tracker.submit("tag", ref=self.node.id, name=NOTES, value="\n".join(self._notes)[-TAG_LENGTH:])

    def finish(self, status: Status, artifact: Artifact | None) -> None:
        """Close the run; the checkpoint it made becomes a LoggedModel with its parents as inputs."""
        tracker, ref = self.tracker, self.node.id
        step, total = self._position
        if status == "FINISHED" and step < total:
            tracker.submit("tag", ref=ref, name=STOPPED_EARLY, value=f"step {step} of {total}")
        if self._samples:
            tracker.submit("table", ref=ref, file="samples.json", table=cards.sample_table(self._samples))
        if self._notes:
            tracker.submit("text", ref=ref, file="notes.txt", text="\n".join(self._notes) + "\n")
        if artifact is not None:
            tracker.submit("made", ref=ref, key=artifact.key, time=now())
            tracker.register(self.node, artifact)
            if self.node.name == STUDENT:
                drawn = lineage.draw_html(tracker.store, [artifact.key], f"{tracker.name} {ref}")
                tracker.submit("text", ref=ref, file="lineage.html", text=drawn)
                tracker.submit("model_text", key=artifact.key, file="lineage.html", text=drawn)
        tracker.submit("end", ref=ref, status=status, time=now())


class EvaluationRun(StageRun):
    """A measurement: metrics on the checkpoint it is of, no run of its own."""

    def forward(self, records: list[dict[str, Any]]) -> None:
        """Keep nothing: the scores hold every completion."""

    def finish(self, status: Status, artifact: Artifact | None) -> None:
        """Put the scores' metrics onto the checkpoint."""
        if artifact is not None:
            self.tracker.scored(self.node, artifact)


def describe_data(node: Node, domain: str, split: str) -> dict[str, str]:
    """One split of a domain, or a task of lm-evaluation-harness, as a dataset: name, digest, where it comes from."""
    if node.stage == "harness":
        entry = {"kind": "lm-evaluation-harness", "options": node.config}
        fingerprint = stable_hash([node.config["task"], node.ingredients["harness"], node.ingredients["task"]])
    else:
        entry = dict(node.domains[domain])
        fingerprint = node.ingredients["domains"][domain]
    return {
        "name": f"{domain}/{split}",
        "digest": cards.dataset_digest(fingerprint),
        "kind": str(entry["kind"]),
        "source": json.dumps(entry["options"]),
        "profile": json.dumps({"fingerprint": fingerprint, "split": split}),
        "split": split,
    }


def now() -> int:
    """Milliseconds since the epoch, MLflow's unit of time."""
    return int(time.time() * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user id has no name
